"""Object stores on this machine, each a process of its own, for tests of URLs.

Real clients speak real HTTP to them: gcsfs, TensorStore and array_record to gcp-storage-emulator,
s3fs to moto. Neither renames: every request that copies an object within the store is refused. The
store for gs:// also enforces the preconditions that TensorStore commits with. Each tells
what it was asked: `asked` reads and empties the list.
"""

import contextlib
import os
import re
import subprocess
import sys
import typing
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlparse

BUCKET = "tiny"
_ASKED = "/requests-so-far"
_CREDENTIALS = {
    "gs": {
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore's
        "NO_GCE_CHECK": "true",
        # gcsfs would ask a second service, which is not emulated, what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    },
    "s3": {
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    },
}
_ENDPOINTS = {
    # gcsfs and Google's Python client; TensorStore; array_record.
    "gs": ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"),
    "s3": ("AWS_ENDPOINT_URL",),
}


@contextlib.contextmanager
def running(scheme: str) -> Iterator[dict[str, str]]:
    """Starts the store for gs:// or s3://; gives the environment in which clients find it."""
    server = subprocess.Popen(
        [sys.executable, __file__, scheme],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | _CREDENTIALS[scheme],
    )
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        yield _CREDENTIALS[scheme] | dict.fromkeys(_ENDPOINTS[scheme], url)
    finally:
        server.stdin.close()  # it ends with its input, and so with a killed test, too
        server.wait(timeout=30)
        server.stdout.close()


def asked(environment: dict[str, str]) -> list[str]:
    """The requests that a store had since the last call, each as "METHOD path?query"."""
    url = next(value for value in environment.values() if value.startswith("http"))
    with urllib.request.urlopen(f"{url}{_ASKED}") as answer:
        return answer.read().decode().splitlines()


def _serve_gs() -> int:
    from gcp_storage_emulator import server  # noqa: PLC0415

    class Handler(server.RequestHandler):
        """What Cloud Storage does and the emulator does not, and no renaming."""

        def do_POST(self):
            query = self._query()
            if re.search(r"/o/.*/(copyTo|rewriteTo|compose)(/|$)", urlparse(self.path).path):
                self.send_error(HTTPStatus.NOT_IMPLEMENTED, "this store does not rename")
            elif query.get("ifGenerationMatch") not in (None, self._generation(query.get("name"))):
                self.send_error(HTTPStatus.PRECONDITION_FAILED)
            else:
                super().do_POST()

        requests: typing.ClassVar[list[str]] = []

        def parse_request(self):
            parsed = super().parse_request()
            if parsed and self.path != _ASKED:
                self.requests.append(f"{self.command} {self.path}")
            return parsed

        def do_GET(self):
            query = self._query()
            if self.path == _ASKED:
                data = "\n".join(self.requests).encode()
                self.requests.clear()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            elif "startOffset" in query:
                # The emulator would ignore the bounds and list too much.
                self.send_error(HTTPStatus.NOT_IMPLEMENTED)
            elif query.get("ifGenerationNotMatch") == self._generation(self._object()):
                self.send_error(HTTPStatus.NOT_MODIFIED)
            else:
                super().do_GET()

        def end_headers(self):
            if self.command == "GET" and self._query().get("alt") == "media":
                self.send_header("x-goog-generation", self._generation(self._object()))
            super().end_headers()

        def _query(self) -> dict[str, str]:
            return {k: v[0] for k, v in parse_qs(urlparse(self.path).query).items()}

        def _object(self) -> str:
            return unquote(urlparse(self.path).path.rpartition("/o/")[2])

        def _generation(self, name: str | None) -> str:
            objects = self.storage.objects.get(BUCKET, {})
            return objects[name]["generation"] if name in objects else "0"

    server.RequestHandler = Handler  # one thread: a check and its write are one
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    running.start()
    return running._api._httpd.server_address[1]


def _serve_s3() -> int:
    import boto3  # noqa: PLC0415
    from moto.moto_server import threaded_moto_server as server  # noqa: PLC0415

    class Application(server.DomainDispatcherApplication):
        requests: typing.ClassVar[list[str]] = []

        def __call__(self, environ, start_response):
            if environ["PATH_INFO"] == _ASKED:
                data = "\n".join(self.requests).encode()
                self.requests.clear()
                start_response("200 OK", [("Content-Length", str(len(data)))])
                return [data]
            query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
            self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}")
            if "HTTP_X_AMZ_COPY_SOURCE" in environ:
                start_response("501 this store does not rename", [])
                return []
            return super().__call__(environ, start_response)

    server.DomainDispatcherApplication = Application
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    port = running.get_host_and_port()[1]
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=BUCKET)
    return port


if __name__ == "__main__":
    print({"gs": _serve_gs, "s3": _serve_s3}[sys.argv[1]](), flush=True)
    sys.stdin.read()
    os._exit(0)
