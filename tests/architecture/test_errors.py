"""Every error a request can meet has its place in the one translation to HTTP."""

import inspect
import re
from types import ModuleType

import pytest

import adapters.errors
import gateway.errors
from gateway.errors import ERROR_OBJECTS


def leaves(module: ModuleType, root: type[Exception]) -> list[type[Exception]]:
    """The classes of the tree that nobody in the same module derives from."""
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, root)]
    return [cls for cls in classes if not any(other is not cls and issubclass(other, cls) for other in classes)]


LEAVES = [
    *leaves(adapters.errors, adapters.errors.AdapterError),
    *leaves(gateway.errors, gateway.errors.GatewayError),
]


@pytest.mark.parametrize("error", LEAVES, ids=lambda cls: cls.__name__)
def test_every_leaf_of_the_error_trees_is_translated_to_http(error: type[Exception]) -> None:
    assert error in ERROR_OBJECTS


def test_the_translations_use_statuses_and_codes_that_clients_can_branch_on() -> None:
    for error, found in ERROR_OBJECTS.items():
        assert 400 <= found.status < 600, error
        assert re.fullmatch("[a-z_]+", found.code), error
