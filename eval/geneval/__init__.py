"""GenEval (Ghosh et al., arXiv 2310.11513) without mmdet: detector, colour classifier, rules and score."""
