"""Changes that many threads make at once are undone by the last of them."""

from __future__ import annotations

import threading

import pytest
from transformers.utils import logging

from vwt_hf.processors import quiet_transformers
from vwt_hf.shared_changes import SharedChange


def test_the_change_is_made_by_the_first_and_undone_by_the_last():
    made = []

    def change():
        made.append("made")
        return lambda: made.append("undone")

    changed = SharedChange(change)
    with changed():
        with changed(), pytest.raises(ValueError), changed():
            raise ValueError
        assert made == ["made"]
    assert made == ["made", "undone"]
    with changed():
        pass
    assert made == ["made", "undone"] * 2


def test_transformers_says_as_much_as_before_where_threads_overlap():
    within, leave = threading.Barrier(2), threading.Event()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def stay():
        with quiet_transformers():
            within.wait()
            leave.wait()

    thread = threading.Thread(target=stay)
    with quiet_transformers():
        thread.start()
        within.wait()
    assert logging.get_verbosity() == logging.ERROR  # the other is still within
    leave.set()
    thread.join()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_progress_bars_that_a_user_turned_off_stay_off():
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
