"""The search of the documentation, in a browser that opens the pages from files."""

from __future__ import annotations

from pathlib import Path

SHIM = Path(__file__).parents[2] / "docs" / "javascripts" / "iframe-worker.js"
WORKER = "addEventListener('message', (event) => postMessage(2 * event.data));"
PAGE = "<body><script src='iframe-worker.js'></script></body>"
ASK = """() => new Promise((done) => {
    const worker = new Worker("worker.js"), seen = [];
    worker.addEventListener("message", (event) => { seen.push(event.data); if (seen.length === 2) done(seen); });
    worker.postMessage(3);
    setTimeout(() => worker.postMessage(21), 50);
})"""


def test_a_worker_answers_on_a_page_from_a_file(browser, tmp_path):
    for name, text in {"page.html": PAGE, "worker.js": WORKER, SHIM.name: SHIM.read_text()}.items():
        (tmp_path / name).write_text(text)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate(ASK) == [6, 42]
    page.close()
