"""``fastgan watch``: a local page that follows a run."""

from __future__ import annotations

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fastgan.training import report
from fastgan.training.rundir import RunDirectory

from .arguments import Commands, nonnegative_int, positive_int

HOST = "127.0.0.1"


def add(commands: Commands) -> argparse.ArgumentParser:
    """Register the command."""
    parser = commands.add_parser(
        "watch",
        help="follow a run in a browser",
        description="Serve a run's report to browsers on this machine alone, made anew at each request.",
    )
    parser.add_argument("run", metavar="DIR", help="the run directory; the run may be under way")
    parser.add_argument("--port", type=nonnegative_int, default=8000, help="default 8000; 0: any that is free")
    parser.add_argument("--every", type=positive_int, default=10, metavar="SECONDS", help="reload (default 10)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    with serve(RunDirectory(args.run), args.port, args.every) as server:
        print(f"http://{HOST}:{server.server_address[1]}/ follows {args.run}; Ctrl-C ends it", flush=True)
        server.serve_forever()
    return 0


def serve(directory: RunDirectory, port: int, every: int) -> ThreadingHTTPServer:
    """A server of the run's page, on the loopback address. Raises ValueError where it cannot be."""
    directory.read_config()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # a page elsewhere could let its own name point here: only this machine's names are answered
            host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if host not in (HOST, "localhost"):
                return self.send_error(403, "ask for 127.0.0.1 or localhost")
            if self.path != "/":
                return self.send_error(404)
            try:
                content = report.page(directory, refresh=every).encode()
            except (OSError, ValueError) as error:  # the run was replaced just now
                return self.send_error(503, str(error).replace("\n", " "))
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Say nothing: the page reloads for hours."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"watch: --port must be free and below 65536, {port} is not: {error}") from error
