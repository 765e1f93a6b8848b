"""The pages of the local Hub for people."""

from __future__ import annotations

import re

import httpx
from hypothesis import given
from hypothesis import strategies as st
from support.local_hub import commit, make_repo

from fp8pipe.rehearsal.localhub.cards import check_card, read_card
from fp8pipe.rehearsal.localhub.markdown import render


def test_a_card_is_shown_with_its_plots_and_without_its_scripts(http: httpx.Client, anonymous: httpx.Client) -> None:
    repo = make_repo(http, "shown")
    card = b"""---
license: mit
base_model: acme/shown-base
tags: [fp8, "<b>bold</b>"]
---
# Title
| Task | Drop |
|---|---:|
| sums | 0.25 |

![drop](fp8pipe/plots/drop.png) [gate](./fp8pipe/gate.json) [bad](javascript:alert(1))
<script>alert(1)</script><img src=x onerror=alert(1)><details onclick=alert(1)>
"""
    files = {
        "README.md": card,
        "fp8pipe/plots/drop.png": b"\x89PNG",
        "<i>.txt": b"x",
        "page.html": b"<script></script>",
    }
    commit(http, repo, files, title="<u>release</u>").raise_for_status()
    http.post(f"/api/models/{repo}/tag/main", json={"tag": "v1"}).raise_for_status()
    answer = anonymous.get(f"/{repo}")
    page = answer.text
    assert '<td style="text-align:right">0.25</td>' in page
    assert f'src="/{repo}/resolve/main/fp8pipe/plots/drop.png"' in page
    assert anonymous.get(f"/{repo}/resolve/main/fp8pipe/plots/drop.png").headers["Content-Type"] == "image/png"
    assert f'href="/{repo}/blob/main/fp8pipe/gate.json"' in page
    assert "license: mit" not in page
    assert all(text in page for text in (">mit<", ">acme/shown-base<", ">fp8<", ">v1<", "drop.png</a>"))
    assert not re.search(r"<(script|img src=x|details|b>|i>|u>)|href=\"javascript", page)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    served = anonymous.get(f"/{repo}/resolve/main/page.html")
    assert served.headers["Content-Type"].startswith("text/plain")
    assert "sandbox" in served.headers["Content-Security-Policy"]


def test_every_page_answers_and_leads_only_to_pages_that_answer(http: httpx.Client, anonymous: httpx.Client) -> None:
    repo = make_repo(http, "linked")
    make_repo(http, "linked-data", "dataset")
    commit(http, repo, {"README.md": b"---\ndatasets: [acme/linked-data]\n---\nHi", "a b.txt": b"1"})
    http.post(f"/api/models/{repo}/tag/main", json={"tag": "v1/x", "message": "first"})
    http.post(f"/api/models/{repo}/discussions", json={"title": "Draft", "description": "d", "pullRequest": True})
    slug = http.post("/api/collections", json={"title": "Linked", "namespace": "acme"}).json()["slug"]
    for kind, name in (("model", repo), ("dataset", "acme/linked-data")):
        http.post(f"/api/collections/{slug}/items", json={"item": {"id": name, "type": kind}, "note": f"n {kind}"})
    todo, seen = {"/", f"/collections/{slug}", f"/{repo}"}, set()
    while todo:
        address = todo.pop()
        seen.add(address)
        answer = anonymous.get(address, headers={"Accept": "text/html"}, follow_redirects=True)
        assert answer.status_code == 200, address
        if address in ("/", f"/collections/{slug}") or "linked" in address:
            links = re.findall(r'(?:href|src)="(/[^"#]*)', answer.text)
            todo |= {link for link in links if link not in seen and ("linked" in link or "static" in link)}
    assert {
        f"/{repo}/tree/v1%2Fx",
        "/datasets/acme/linked-data",
        f"/{repo}/discussions/1",
    } <= seen
    assert "n dataset" in anonymous.get(f"/collections/{slug}").text
    lost = anonymous.get("/acme/linked-nowhere", headers={"Accept": "text/html"})
    assert (lost.status_code, lost.headers["X-Error-Code"]) == (401, "RepoNotFound")
    assert lost.headers["Content-Type"].startswith("text/html")


@given(st.text(alphabet=st.sampled_from("<>/ \"'=abdeilmrstuy!-\n`&;"), max_size=60))
def test_no_text_makes_markdown_emit_an_element_of_its_own(source: str) -> None:
    shown = render(source, link=str, image=str)
    ours = "p|h[1-6]|em|strong|ul|ol|li|code|pre|blockquote|hr|br|a|img|s|table|thead|tbody|tr|th|td"
    folded = "details|summary|sub|sup|kbd|b|i"
    assert not re.search(rf"<(?!/?(?:{ours}|{folded})(?:>| /?>| [a-z]+=\"))[a-zA-Z/!]", shown), shown
    assert not re.search(r"<[^>]* on\w+=", shown)


def test_a_front_matter_is_taken_off_the_text_and_checked() -> None:
    card = read_card("---\r\nlicense: mit\r\n---\r\n# T\r\n---\r\nnot yaml\r\n---\r\n")
    assert card.metadata == {"license": "mit"}
    assert card.body.startswith("# T")
    assert read_card("# no front matter\n---\na: 1\n---\n").metadata == {}
    assert check_card("---\n---\nx").warnings
    assert check_card("---\nlicense: 3\n---\n").errors
