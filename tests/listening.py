"A real server for the tests, in a thread of theirs."

import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def listening(app):
    "Serve an application on a free port."
    config = uvicorn.Config(app, port=0, log_level="critical", http="httptools", ws="none", server_header=False)
    server = uvicorn.Server(config)
    opened = config.bind_socket()
    thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
