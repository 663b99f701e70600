from bksdm.licence import Licence, joined


def test_joined_licences_keep_every_name_once_and_both_texts():
    made = joined(Licence("MIT", "Ours.\n"), Licence("Apache-2.0 and MIT", "Theirs.\n"))
    assert made.name == "MIT and Apache-2.0"
    assert made.notice.startswith("Ours.")
    assert made.notice.endswith("Theirs.\n")


def test_a_text_that_holds_the_other_stands_alone():
    long, short = Licence("MIT", "One.\n\nTwo.\n"), Licence("MIT", "Two.\n")
    assert joined(long, short) == joined(short, long) == long
