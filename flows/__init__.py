"""The pipeline as sentences: each line of a flow is one stage, each branch is a decision."""
