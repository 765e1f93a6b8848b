"""What is in the folder or repository: files, headers and records, read without trusting them."""
