import rorqual.serve
from rorqual.serve import errors


def test_all_is_sorted_and_real():
    names = rorqual.serve.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name.islower() or "_" in name, name))
    assert all(hasattr(rorqual.serve, name) for name in names)


def test_every_error_is_exported():
    assert set(errors.__all__) <= set(rorqual.serve.__all__)
