"""From an accepted folder to a repository: its card, its plots, publishing, and the work folder of a release."""
