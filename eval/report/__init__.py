"""From scored folders to a page, a table and a JSON file."""
