"""The pipeline as sentences: each line of a flow is a stage, each branch a decision."""
