"Databases for the tests: one throwaway server a session, a fresh database a test."

import itertools
import os
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from mlops_workbench.settings import Settings
from mlops_workbench.store import Store, open_store, temporary_store

# A second server to test on, such as a PostgreSQL of the system; the role must be allowed to create databases.
OTHER_URL = os.environ.get("WORKBENCH_TEST_DATABASE_URL")
SERVERS = ["embedded", *(["other"] if OTHER_URL else [])]

_numbers = itertools.count(1)


def with_database(url, name):
    "Point a libpq URL to another database of its server."
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def execute(url, *statements):
    "Run statements outside a transaction, as CREATE DATABASE wants it."
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


class Server:
    "A server of the tests, with a migrated database to copy."

    def __init__(self, url):
        self.url = url
        self.prefix = f"workbench_test_{os.getpid()}"
        self.template = self.new_database()
        open_store(Settings("test", None, None, self.template)).close()

    def new_database(self, template="template0"):
        name = f"{self.prefix}_{next(_numbers)}"
        execute(self.url, f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        return with_database(self.url, name)

    def drop(self, url):
        execute(self.url, f'DROP DATABASE IF EXISTS "{urlsplit(url).path[1:]}" WITH (FORCE)')

    @contextmanager
    def database(self, migrated=True):
        url = self.new_database(urlsplit(self.template).path[1:] if migrated else "template0")
        try:
            yield url
        finally:
            self.drop(url)


@contextmanager
def serve(kind):
    if kind == "other":
        server = Server(OTHER_URL)
        try:
            yield server
        finally:
            server.drop(server.template)
    else:
        with temporary_store() as store:
            yield Server(store.url)


@pytest.fixture(scope="session", params=SERVERS)
def server(request):
    "Give a server that may create databases."
    with serve(request.param) as found:
        yield found


@pytest.fixture
def empty_url(server):
    "Give the URL of a database without any tables."
    with server.database(migrated=False) as url:
        yield url


@pytest.fixture
def store(server):
    "Give an open store on a database of its own."
    with server.database() as url, Store(url) as opened:
        yield opened
