"""The garbage collector is paused within a block, and afterwards as it was."""

import gc

import pytest

from freemerge.runtime.collector import without_collections


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_is_off_inside_and_afterwards_as_before(before: bool) -> None:
    was = gc.isenabled()
    switch = {True: gc.enable, False: gc.disable}
    try:
        switch[before]()
        with without_collections():
            assert not gc.isenabled()
        assert gc.isenabled() == before
        with pytest.raises(ImportError, match="broken"), without_collections():
            raise ImportError("broken")
        assert gc.isenabled() == before
    finally:
        switch[was]()
