"""How does werkzeug's (Flask's) development server serve the mesh's mTLS? A request handler that takes each connection
as `serve` says: `app.run(request_handler=meshlib.inbound.werkzeug.RequestHandler)`."""

from __future__ import annotations

from werkzeug.serving import WSGIRequestHandler

from meshlib.inbound.serve import registered


class RequestHandler(WSGIRequestHandler):
    """On the connection's own thread, where the server is threaded (the default)."""

    is_refused = False

    def setup(self) -> None:
        try:
            self.request = registered().accept(self.request)
        except OSError:
            self.is_refused = True  # said and closed
            return
        super().setup()

    def handle(self) -> None:
        if not self.is_refused:
            super().handle()

    def finish(self) -> None:
        if not self.is_refused:
            super().finish()
            self.request.close()
