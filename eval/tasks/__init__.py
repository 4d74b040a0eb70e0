"""What is generated for: lists of prompts, each a benchmark of its own with its counts checked."""
