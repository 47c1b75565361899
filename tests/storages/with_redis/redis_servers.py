"""Redis servers of the tests' own, and networks before them that behave badly."""

from __future__ import annotations

import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from waiting import until

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from redis.exceptions import RedisError  # noqa: E402

SERVER = shutil.which("redis-server")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Server:
    """A redis-server of our own."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        port: int = 0,
        command: Sequence[str] = (),
        **connection: Any,
    ) -> None:
        self.port = port or free_port()
        self._connection = connection
        folder.mkdir(parents=True, exist_ok=True)
        if not command:
            command = ["--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
            command += options or ["--port", str(self.port)]
        self._command = [str(SERVER), *command]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with closing(self.client()) as client, suppress(RedisError):
                return bool(client.ping())
            return False

        until(answers)

    def client(self, **options: Any) -> Any:
        return redis.Redis(port=self.port, **self._connection, **options)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def replica_of(folder: Path, server: Server) -> Server:
    """A server that has all that `server` has."""
    replica = Server(folder)
    with closing(server.client()) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    with closing(replica.client()) as client:
        client.replicaof("127.0.0.1", server.port)
        until(lambda: client.info("replication")["master_link_status"] == "up")
    return replica


def replicate(server: Server) -> None:
    """Wait until its replica has all that is in `server` now."""
    with closing(server.client()) as client:
        client.set("replicated", 1)  # WAIT asks for what this very connection has written
        assert client.wait(1, 0) == 1


class Sentinel(Server):
    """One who decides alone who is the primary."""

    def __init__(
        self, folder: Path, primary: Server, service: str, *settings: str, **connection: Any
    ) -> None:
        self._service = service
        file, port = folder / "sentinel.conf", free_port()
        folder.mkdir(parents=True)
        listens = f"port 0\ntls-port {port}" if connection.get("ssl") else f"port {port}"
        lines = [
            f"{listens}\nbind 127.0.0.1\ndir {folder}",
            *settings,
            f"sentinel monitor {service} 127.0.0.1 {primary.port} 1",
            f"sentinel down-after-milliseconds {service} 300",
            f"sentinel failover-timeout {service} 1000",
        ]
        file.write_text("\n".join(lines) + "\n")
        super().__init__(folder, command=[str(file), "--sentinel"], port=port, **connection)

    def knows_replicas(self) -> int:
        with closing(self.client()) as client:
            return len(client.sentinel_slaves(self._service))


def certificate(folder: Path) -> tuple[Path, Path]:
    """For TLS on this machine, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


class Network:
    """A network before a server, which can lead to another one, refuse, and swallow."""

    def __init__(self, to: Server) -> None:
        self.to = to  # where new connections lead
        self.made = 0
        self.refusing = 0  # so many more connections
        self.swallowed: list[bytes] = []  # what was sent into dead connections
        self._era = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self) -> None:
        """Let the connections that are there lead nowhere, and say nothing: as a NAT that has
        forgotten them."""
        self._era += 1

    def cut(self) -> None:
        """Close the connections that are there."""
        for one in self._sockets[1:]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.made += 1
                if self.refusing:
                    self.refusing -= 1
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.to.port))
                self._sockets += [near, far]
                threading.Thread(target=self._pass, args=(near, far), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        era = self._era
        with suppress(OSError, ValueError):
            while True:
                for one in select.select([near, far], [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        for each in (near, far):
                            each.shutdown(socket.SHUT_RDWR)
                        return
                    if era == self._era:
                        (far if one is near else near).sendall(data)
                    elif one is near:
                        self.swallowed.append(data)

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
