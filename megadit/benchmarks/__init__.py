"""What `megadit bench` measures: ratios beside a named baseline. A file for each command, one kind of table."""
