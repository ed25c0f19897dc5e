"""Where data are found and fetched, with a server on this machine that misbehaves on demand.

No other machine is ever asked: in these tests the names of all others are unknown.
"""

import errno
import hashlib
import http.server
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_data import MAZE, refusal, rows, two_episodes, write, write_minari

import ampl

PEN = "pen-human-v1"
HOPPER = "hopper-medium-v2"
LOCAL = "127.0.0.1"


# --- the server ---
# How it answers a request is a function of the request's handler and the file that was asked for.


def whole(handler, body):
    handler.start(200, len(body))
    handler.wfile.write(body)


def cut(handler, body):
    """The whole length is announced, but half of it comes, at every request."""
    handler.start(200, len(body))
    handler.wfile.write(body[: len(body) // 2])


def cut_then_rest(handler, body):
    """As `cut`; but who asks for the missing part gets it."""
    if "Range" not in handler.headers:
        return cut(handler, body)
    first = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    handler.start(206, len(body) - first)
    handler.wfile.write(body[first:])


def stall(handler, body):
    """A few bytes, then silence."""
    handler.start(200, len(body))
    handler.wfile.write(body[:900])
    handler.server.silent.set()
    handler.server.released.wait(10)


def login_page(handler, body):
    whole(handler, b"<html>please log in</html>")


def shorter(handler, body):
    """A whole HDF5 file, but another."""
    whole(handler, handler.server.short)


def longer(handler, body):
    """HDF5 does not mind bytes behind its end."""
    whole(handler, body + b"\0")


def status(code):
    return lambda handler, body: handler.start(code, 0)


class Handler(http.server.BaseHTTPRequestHandler):
    def handle(self):
        if self.connection.recv(1, socket.MSG_PEEK) == b"\x16":  # this server has no encryption
            self.server.asked.append("https")
        else:
            super().handle()

    def do_GET(self):
        name = "d4rl"
        for other, start in (("mirror", ampl.MIRROR), ("minari", ampl.MINARI)):
            if self.path.startswith(f"/{start}/"):
                name = other
        self.server.asked.append(name)
        self.server.paths.append(self.path)
        manners = self.server.manners.get(name, [status(404)])
        manner = manners.pop(0) if len(manners) > 1 else manners[0]
        manner(self, self.server.bodies[name])

    def start(self, code, length):
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """D4RL's server, the mirror and Minari in one. What has no `manners` answers 404."""
    resolve = socket.getaddrinfo

    def resolve_local(host, *args, **kwargs):
        if host != LOCAL:
            raise OSError(f"a test asked for {host}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_local)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer((LOCAL, 0), Handler) as server:
        server.daemon_threads = True
        server.manners = {}
        server.asked = []
        server.paths = []
        server.silent = threading.Event()
        server.released = threading.Event()
        body = Path(write(tmp_path / "origin.hdf5", rows(300))).read_bytes()
        minari = write_minari(tmp_path / "minari.hdf5", two_episodes()).read_bytes()
        server.bodies = {"d4rl": body, "mirror": body, "minari": minari}
        server.short = Path(write(tmp_path / "short.hdf5", rows(20))).read_bytes()
        server.home = tmp_path / "d4rl"
        server.minari_home = tmp_path / "minari"
        known = (len(body), hashlib.sha256(body).hexdigest())
        monkeypatch.setattr(
            ampl, "D4RL_FILES", {f"{PEN}.hdf5": known, "hopper_medium-v2.hdf5": known}
        )
        point_to(f"http://{LOCAL}:{server.server_port}", monkeypatch)
        monkeypatch.setenv("D4RL_DATASET_DIR", str(server.home))
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(server.minari_home))
        monkeypatch.setattr(ampl, "SILENCE", 0.5)
        monkeypatch.setattr(ampl, "PAUSE", 0.01)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def point_to(address, monkeypatch):
    """Let all sources be at this address."""
    names = {PEN: PEN, HOPPER: "hopper_medium-v2", MAZE: "maze2d-umaze-sparse-v1"}
    urls = {env_id: f"{address}/d4rl/{name}.hdf5" for env_id, name in names.items()}
    monkeypatch.setattr(ampl, "d4rl_tables", lambda: {"DATASET_URLS": urls})
    monkeypatch.setenv("HF_ENDPOINT", address)


def find(env_id, **flags):
    return ampl.find_dataset(ampl.Args(env_id, **flags))


def failure(env_id):
    """The message [lines] of a search in vain, which leaves no file behind."""
    with pytest.raises(SystemExit) as stop:
        find(env_id)
    assert isinstance(stop.value.code, str)
    return stop.value.code.splitlines()


def files_in(folder):
    """All files below a folder, without their folders and the records of where they are from."""
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if not name.endswith(".source.json")]


# --- looking ---


def test_named_file_comes_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    server.home.mkdir()
    write(server.home / f"{PEN}.hdf5", rows())
    assert find(PEN, dataset_path="~/own.hdf5") == tmp_path / "own.hdf5"
    assert find(PEN) == server.home / f"{PEN}.hdf5"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    path = tmp_path / ".d4rl/datasets/Pendulum-v1.hdf5"  # that folder may hold one's own, too
    path.parent.mkdir(parents=True)
    write(path, rows())
    assert find("Pendulum-v1") == path
    assert not server.asked


def test_folders_come_before_downloads(server, capsys):
    """D4RL's folder, then Minari's."""
    server.manners = {"d4rl": [whole]}
    minari = server.minari_home / "D4RL/pen/human-v2/data/main_data.hdf5"
    minari.parent.mkdir(parents=True)
    minari.write_bytes(server.bodies["minari"])
    assert find(PEN) == minari
    assert "Minari's file" in capsys.readouterr().out
    assert not server.asked
    server.home.mkdir()
    write(server.home / f"{PEN}.hdf5", rows())
    assert find(PEN) == server.home / f"{PEN}.hdf5"


def test_what_no_server_has(server):
    assert "--dataset-path" in refusal(find, "Hopper-v4")
    assert "python collect.py --env-id ant-angle-v0" in refusal(find, "ant-angle-v0")
    assert not server.asked


def test_tilde_is_expanded_where_data_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "own.hdf5", rows())
    data = ampl.load_dataset(ampl.Args(MAZE, dataset_path="~/own.hdf5"))
    assert data["source"]["dataset"] == str(tmp_path / "own.hdf5")


# --- sources ---


def test_order_of_sources(server, capsys):
    """Each line says what is next and why; the first file that is accepted ends the search."""
    server.manners = {"d4rl": [status(403)], "minari": [whole]}
    path = find(PEN)
    assert server.asked == ["https", "d4rl", "mirror", "minari"]
    assert server.paths[1] == f"/{ampl.MIRROR}/{PEN}.hdf5"
    assert server.paths[2] == f"/{ampl.MINARI}/pen/human-v2/data/main_data.hdf5"
    assert path == server.minari_home / "D4RL/pen/human-v2/data/main_data.hdf5"
    assert path.read_bytes() == server.bodies["minari"]
    lines = capsys.readouterr().out.splitlines()
    starts = [
        f"there is no {server.home / PEN}.hdf5; next: D4RL's server, https://",
        "that failed (<urlopen error",
        "that failed (HTTP Error 403: Forbidden); next: a mirror (accepted only with D4RL",
        "that failed (HTTP Error 404: Not Found); next: Minari (its re-recorded episodes, not D4RL",
        f"got {path} with sha256 {hashlib.sha256(server.bodies['minari']).hexdigest()}",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts):
        assert line.startswith(start)
    assert find(PEN) == path  # it is there now
    assert len(server.asked) == 4


def test_only_known_files_are_asked_of_the_mirror(server):
    server.manners = {"mirror": [whole]}
    failure(MAZE)  # no checksum of it is known, and Minari has none of it
    assert server.asked == ["https", "d4rl"]
    assert find(HOPPER).read_bytes() == server.bodies["mirror"]


def test_the_mirror_must_be_equal(server):
    server.manners = {"mirror": [longer]}
    message = failure(HOPPER)[0]
    assert "a mirror (accepted only with D4RL's sha256): not D4RL's file" in message
    assert not files_in(server.home)


def test_a_file_of_minari_must_have_its_form(server):
    server.manners = {"minari": [shorter]}  # of D4RL's form
    assert "Minari" in failure(PEN)[0]
    assert not files_in(server.home) + files_in(server.minari_home)
    whole_file = write_minari(server.home / "m.hdf5", two_episodes())
    with h5py.File(whole_file, "a") as file:
        del file["episode_1/observations"]
        file["episode_1/observations"] = np.zeros((2, 4))  # the last one is missing
    server.bodies["minari"] = whole_file.read_bytes()
    server.manners = {"minari": [whole]}
    assert "episode_1 is not of Minari's form" in failure(PEN)[0]
    assert not files_in(server.minari_home)


def test_another_file_of_the_known_name_on_d4rls_server(server, capsys):
    """Refused where it is shorter. Else it may have been compressed anew, and a note says so."""
    server.manners = {"d4rl": [shorter], "mirror": [whole]}
    assert find(HOPPER).read_bytes() == server.bodies["mirror"]
    known = len(server.bodies["d4rl"])
    assert f"{len(server.short)} bytes, where {known} are known" in capsys.readouterr().out
    server.manners = {"d4rl": [longer]}
    assert find(PEN).stat().st_size == known + 1
    assert f"note: {PEN}.hdf5 has another sha256" in capsys.readouterr().out


# --- faults ---


def test_a_busy_server_is_asked_again(server, capsys):
    server.manners = {"d4rl": [status(503), status(503), whole]}
    assert find(MAZE).read_bytes() == server.bodies["d4rl"]
    assert server.asked == ["https", "d4rl", "d4rl", "d4rl"]
    assert capsys.readouterr().out.count("the same server again in") == 2


def test_a_cut_download_goes_on(server, capsys):
    server.manners = {"d4rl": [cut_then_rest]}
    assert find(MAZE).read_bytes() == server.bodies["d4rl"]
    assert server.asked == ["https", "d4rl", "d4rl"]
    size = len(server.bodies["d4rl"])
    assert f"broke off after {size // 2} of {size} bytes" in capsys.readouterr().out


def test_a_server_without_parts_sends_all_again(server):
    server.manners = {"d4rl": [cut, whole]}
    assert find(MAZE).read_bytes() == server.bodies["d4rl"]


@pytest.mark.parametrize("manner, requests, reason", [
    (status(403), 1, "403"),
    (status(503), 3, "503"),
    (cut, 4, "broke off"),  # the first did bring something
    (login_page, 1, "begins with b'<html>"),
    (stall, 4, "timed out"),
])  # fmt: skip
def test_a_fault_that_stays(manner, requests, reason, server):
    """It ends at the next source, in a short time, and leaves nothing behind."""
    server.manners = {"d4rl": [manner], "mirror": [whole]}
    started = time.monotonic()
    assert find(HOPPER).read_bytes() == server.bodies["mirror"]
    assert time.monotonic() - started < 15
    assert server.asked == ["https", *["d4rl"] * requests, "mirror"]
    server.manners = {"d4rl": [manner]}
    assert reason in failure(MAZE)[0]
    assert files_in(server.home) == ["hopper_medium-v2.hdf5"]


def test_silence_before_the_first_byte(server):
    """A server that takes the connection and never says a word."""
    server.manners = {"d4rl": [lambda handler, body: server.released.wait(5)], "mirror": [whole]}
    started = time.monotonic()
    assert find(HOPPER).read_bytes() == server.bodies["mirror"]
    assert time.monotonic() - started < 3
    assert server.asked == ["https", "d4rl", "mirror"]


def test_a_full_disk_ends_the_search(server, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    server.manners = {"d4rl": [whole], "mirror": [whole]}
    monkeypatch.setattr(ampl.Bar, "move_to", full)
    assert refusal(find, HOPPER).startswith(f"no room for {server.home}/")
    assert server.asked == ["https", "d4rl"]
    assert not files_in(server.home)


# --- the message ---


def test_message_without_any_net(server, monkeypatch):
    """At most four lines, with whole commands to paste. The address is one where nobody listens."""
    with socket.socket() as unused:
        unused.bind((LOCAL, 0))
        port = unused.getsockname()[1]
    address = f"http://{LOCAL}:{port}"
    point_to(address, monkeypatch)
    curl = f"curl -fL -C - --create-dirs -o {server.home}/"

    encrypted = address.replace("http://", "https://")
    lines = failure(PEN)
    assert lines[0].startswith(f"no data for {PEN} (that failed, too: Minari (")
    assert lines[0].count("Connection refused") == 1  # the others are said where they fail
    assert lines[1:] == [
        f"{curl}{PEN}.hdf5 {encrypted}/d4rl/{PEN}.hdf5",
        'pip install "minari[hdf5,hf]" && minari download D4RL/pen/human-v2',
    ]
    lines = failure(MAZE)
    name = "maze2d-umaze-sparse-v1.hdf5"
    assert lines[1] == f"{curl}{name} {encrypted}/d4rl/{name}"
    assert lines[2].startswith(f"python collect.py --env-id {MAZE} ")
    assert len(lines) == 3
    assert not files_in(server.home)


def test_the_tasks_that_collect_makes():
    collect = pytest.importorskip("collect")
    for env_id in (*collect.MAZE2D_TASKS, *collect.SAC_TASKS):
        assert ampl.COLLECTED.fullmatch(env_id)
    for env_id in ("maze2d-open-v0", "hopper-full-replay-v2", "hopper-medium-v0", PEN):
        assert not ampl.COLLECTED.fullmatch(env_id)


# --- several processes, and killed ones ---


def start_download(env_id):
    """In another process, which starts as a copy of this one."""
    process = multiprocessing.get_context("fork").Process(target=find, args=[env_id])
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_at_once(server):
    both = threading.Barrier(2, timeout=20)

    def wait_for_the_other(handler, body):
        handler.start(200, len(body))
        handler.wfile.write(body[:900])
        both.wait()
        handler.wfile.write(body[900:])

    server.manners = {"d4rl": [wait_for_the_other]}
    processes = [start_download(MAZE), start_download(MAZE)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert server.asked.count("d4rl") == 2
    assert files_in(server.home) == ["maze2d-umaze-sparse-v1.hdf5"]
    assert find(MAZE).read_bytes() == server.bodies["d4rl"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_download(server, monkeypatch):
    """What it leaves is not taken for data, and is taken away an hour later."""
    monkeypatch.setattr(ampl, "SILENCE", 20)
    server.manners = {"d4rl": [stall, whole]}
    process = start_download(MAZE)
    assert server.silent.wait(20)
    name = "maze2d-umaze-sparse-v1.hdf5"
    while not list(server.home.glob("*.part")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (part,) = server.home.iterdir()
    assert part.name.startswith(f"{name}.") and str(process.pid) in part.name

    assert find(MAZE).read_bytes() == server.bodies["d4rl"]
    assert sorted(files_in(server.home)) == sorted([name, part.name])  # it might be alive
    os.utime(part, (time.time() - 4000, time.time() - 4000))
    (server.home / name).unlink()
    find(MAZE)
    assert files_in(server.home) == [name]


# --- what a result says of it ---


def test_origin(server, tmp_path):
    """By the record of a download where the file is still that one, and by its bytes."""
    server.manners = {"d4rl": [whole]}
    path = find(PEN)
    sha256 = hashlib.sha256(server.bodies["d4rl"]).hexdigest()
    url = ampl.d4rl_entry("DATASET_URLS", PEN)
    assert ampl.origin_of(path, sha256) == f"{url} (D4RL's bytes, by their sha256)"
    assert json.loads(ampl.record_path(path).read_text()) == {"url": url, "sha256": sha256}

    write(path, rows(30))  # by hand
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    kind = "not the bytes that are known under this name"
    assert ampl.origin_of(path, other) == f"a local file ({kind})"
    with h5py.File(path, "a") as file:
        file.attrs["note"] = "A re-collection."
    assert ampl.origin_of(path, other).endswith("(made by collect.py, not D4RL's bytes)")
    own = write_minari(tmp_path / "own.hdf5", two_episodes())
    assert ampl.origin_of(own, "") == "a local file (episodes in Minari's form)"


def test_origin_in_the_source_of_a_run(server, monkeypatch, capsys):
    """Of Minari's file, in what result.json and checkpoints take over."""
    episode = {
        "observations": np.ones((4, 45)),
        "actions": np.zeros((3, 24)),
        "rewards": np.arange(3.0),
        "terminations": np.zeros(3, bool),
        "truncations": np.arange(3) == 2,
    }
    path = write_minari(server.minari_home.with_suffix(".hdf5"), [episode] * 3)
    server.bodies["minari"] = path.read_bytes()
    server.manners = {"minari": [whole]}
    references = {"REF_MIN_SCORE": {PEN: 0.0}, "REF_MAX_SCORE": {PEN: 3.0}}
    tables = ampl.d4rl_tables() | references
    monkeypatch.setattr(ampl, "d4rl_tables", lambda: tables)
    source = ampl.load_dataset(ampl.Args(PEN))["source"]
    url = f"{os.environ['HF_ENDPOINT']}/{ampl.MINARI}/pen/human-v2/data/main_data.hdf5"
    origin = f"{url} (Minari's re-recorded episodes, not D4RL's bytes)"
    assert source["obtained_from"] == origin
    assert source["data_score"] == 100
    assert f"data from {origin}" in capsys.readouterr().out


# --- without d4rl ---


def test_without_d4rl(tmp_path, monkeypatch):
    """What needs its tables says how to install it, and the rest works."""
    find_spec = importlib.util.find_spec

    def missing(name, *args):
        return None if name == "d4rl" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    monkeypatch.setattr(ampl, "d4rl_tables", ampl.d4rl_tables.__wrapped__)  # without its cache
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))

    data = rows(observations=np.zeros((11, 3)), actions=np.zeros((11, 1)))
    own = write(tmp_path / "own.hdf5", data)
    args = ampl.Args("Pendulum-v1", dataset_path=own)
    assert ampl.load_dataset(args)["source"]["rows"] == 11
    assert ampl.reference_returns("Pendulum-v1") is None
    assert "--dataset-path" in refusal(find, "Pendulum-v1")

    install = "pip install --no-deps d4rl==1.1"
    for function in (find, ampl.make_env, ampl.reference_returns):
        assert refusal(function, HOPPER) == f"{HOPPER}: {ampl.NO_D4RL}"
    assert install in ampl.NO_D4RL
    message = refusal(ampl.make_env, "Pendulm-v1")
    assert "did you mean Pendulum-v1" in message and install in message


def test_the_known_files_are_those_of_the_table():
    """39 names, each of a task that d4rl knows; each checksum once."""
    urls = ampl.d4rl_tables()["DATASET_URLS"]
    if not urls:
        pytest.skip("d4rl is not installed")
    names = {url.rsplit("/", 1)[-1] for url in urls.values()}
    assert set(ampl.D4RL_FILES) <= names
    assert len(ampl.D4RL_FILES) == 39
    assert len({sha256 for _, sha256 in ampl.D4RL_FILES.values()}) == 39
    for size, sha256 in ampl.D4RL_FILES.values():
        assert size > 2_000_000
        assert len(bytes.fromhex(sha256)) == 32
