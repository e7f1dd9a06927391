import pytest

from adapters.errors import BaseModelError, BlobError, DatabaseError
from gateway.errors import EngineStartError, error_body


@pytest.mark.parametrize("kind", [BaseModelError, BlobError, DatabaseError, EngineStartError, ZeroDivisionError])
def test_what_names_the_operators_paths_is_not_told_to_callers(kind: type[Exception]) -> None:
    error = error_body(kind("/srv/lorikeet/versions/acme is not readable by user 1000"))["error"]
    assert "/srv" not in error["message"]
    assert error["message"]
    assert error["code"]
