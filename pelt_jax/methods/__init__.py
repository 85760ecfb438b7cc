"""Methods: one paper, one file. Each composes nodes and holds no interception."""
