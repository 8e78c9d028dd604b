"""One function over many cases, a job for each."""
