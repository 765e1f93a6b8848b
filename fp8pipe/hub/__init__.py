"""The only room that talks to the Hugging Face Hub, through huggingface_hub.

source       from a model's name to a snapshot at one commit
download     the snapshot's files
headers      safetensors headers by HTTP range requests
datasets     dataset repositories
upload       a folder as one commit, compared with the Hub afterwards
collections  adding a release to a collection
model_card   the front matter of a card
client       the client, and the translation of its errors into ours
"""
