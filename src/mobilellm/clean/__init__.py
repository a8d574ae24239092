"""Text to cleaner text: filters, decontamination and deduplication as datatrove pipelines."""
