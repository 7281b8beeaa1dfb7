"""The schema of job.yaml, and the way from text to a checked job."""
