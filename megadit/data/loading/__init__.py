"""From a data set to batches: the order of samples, chunks read ahead, decoded, put together for a rank."""
