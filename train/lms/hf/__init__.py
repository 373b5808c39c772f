"""Language models of the Hugging Face libraries."""
