"""The page of a training: one file, with everything inside."""

from benchmarks.cells import page


def test_a_page_needs_nothing_else(tmp_path):
    picture = tmp_path / "alpha.png"
    picture.write_bytes(b"\x89PNG")
    rows = [{"arm": "tb <TempBalance>", "last": "98.00%"}]
    layers = [{"layer": f"blocks/{i}", "alpha": "2.1"} for i in range(3)]
    sections = [("Arms", rows), ("Layers", layers)]
    content = page("resnet & digits", "Of the test set.", sections, [picture])
    assert '<img alt="alpha" src="data:image/png;base64,iVBORw==">' in content
    assert content.count("src=") == 1
    assert "http" not in content
    assert "href" not in content
    for text in ("<h1>resnet &amp; digits</h1>", "tb &lt;TempBalance&gt;", "blocks/2"):
        assert text in content
    assert content.count("<details>") == content.count("</details>") == 1
