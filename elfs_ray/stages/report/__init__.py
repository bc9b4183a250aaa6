"""report: the page and the metrics that a person looks at."""
