"""A web page of another origin that chats with ``mmphi serve --cors``."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from answerers import answerer, served
from browser import launched

from mmphi.serving.api import ServerConfig
from mmphi.serving.serve import LOCAL

pytestmark = pytest.mark.browser
PAGE = """<!DOCTYPE html>
<title>chat</title>
<p id="answer"></p>
<script>
async function ask(address) {
  const answer = document.getElementById("answer");
  try {
    const response = await fetch(address + "/v1/chat/completions", {
      method: "POST",
      headers: {"Content-Type": "application/json", "Authorization": "Bearer none"},
      body: JSON.stringify({messages: [{role: "user", content: "hello"}], max_tokens: 8, stream: true}),
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      text += value;
    }
    const chunks = text.split("\\n\\n").filter((line) => line.startsWith("data: {"));
    answer.textContent = chunks.map((line) => JSON.parse(line.slice(6)).choices[0].delta.content || "").join("");
  } catch (error) {
    answer.textContent = "refused: " + error;
  }
  document.title = "done";
}
</script>
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[str]:
    """Another web server, which has the page."""
    (tmp_path / "index.html").write_text(PAGE)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def shown(origin: str, origins: tuple[str, ...]) -> str:
    """What the page of an origin shows, of a server that allows some origins."""
    with (
        served(answerer(), ServerConfig("tiny", hosts=LOCAL, origins=origins), slots=1) as address,
        launched() as browser,
    ):
        page = browser.new_page()
        page.goto(origin)
        page.evaluate("address => ask(address)", address)
        page.wait_for_function("document.title == 'done'")
        return str(page.locator("#answer").inner_text())


def test_a_page_of_an_origin_that_is_allowed_chats(origin: str) -> None:
    expected = answerer().chat([{"role": "user", "content": "hello"}], max_tokens=8)
    assert shown(origin, (origin,)).split() == expected.split()


def test_a_page_of_any_other_origin_is_refused_by_the_browser(origin: str) -> None:
    assert shown(origin, ("https://page.example",)).startswith("refused: TypeError")
