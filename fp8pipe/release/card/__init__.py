"""The records of a release in, its model card out: Markdown with front matter, the same bytes for the same records.

    card_for_folder(folder, ...)    reads DIR/fp8pipe/ and renders
    render_card(facts)              pure
    collection_note(decision)       the line under the model in its collection

There is no clock: two renderings do not differ, so republishing changes no byte. Names and texts come from
configurations and other people's repositories, and all of them pass through an escaping filter (`markdown.py`).
"""

from fp8pipe.release.card.render import card_for_folder, render_card
from fp8pipe.release.card.verdict import collection_note

__all__ = ["card_for_folder", "collection_note", "render_card"]
