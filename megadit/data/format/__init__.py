"""What a data set is on disk: manifest, index, resolution buckets, and members by their places."""
