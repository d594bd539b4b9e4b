import hashlib
import http.server
import threading

import pytest

from gidef.data.download import Unreachable, fetch
from gidef.errors import InputError

CONTENT = bytes(range(256)) * 3000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine's loopback."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as it:
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{it.server_port}"
        it.shutdown()
        thread.join()


def test_a_file_arrives_whole_with_its_progress(server, tmp_path):
    seen = []
    fetch(f"{server}/file", tmp_path / "new" / "file.npz", md5=MD5, progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "new" / "file.npz").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.npz"]


@pytest.mark.parametrize(("page", "error"), [("/missing", "404"), ("/cut", "broke off")])
def test_a_failed_transfer_leaves_nothing_behind(server, tmp_path, page, error):
    (tmp_path / "file.npz").write_bytes(b"older")
    with pytest.raises(Unreachable, match=error):
        fetch(server + page, tmp_path / "file.npz", md5=MD5)
    assert (tmp_path / "file.npz").read_bytes() == b"older" and len(list(tmp_path.glob(".file*"))) == 0


def test_a_wrong_checksum_is_an_error(server, tmp_path):
    with pytest.raises(InputError, match="changed it on the way"):
        fetch(f"{server}/file", tmp_path / "file.npz", md5="0" * 32)
    assert not (tmp_path / "file.npz").exists() and len(list(tmp_path.glob(".file*"))) == 0


def test_no_server_is_unreachable_and_no_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(Unreachable):
        fetch("http://127.0.0.1:1/file", tmp_path / "file.npz", md5=MD5)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        fetch("http://127.0.0.1:1/file", tmp_path / "file" / "file.npz", md5=MD5)
