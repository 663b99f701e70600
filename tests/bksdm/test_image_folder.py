from bksdm.image_folder import digest


def test_every_byte_of_the_listing_and_of_its_pictures_counts(tmp_path):
    def write(listing, a, b):
        for name, content in (("metadata.jsonl", listing), ("a.png", a), ("b.png", b)):
            (tmp_path / name).write_bytes(content)
        return digest(tmp_path, ["a.png", "b.png"])

    assert write(b"x", b"12", b"3") == write(b"x", b"12", b"3")
    contents = [(b"x", b"12", b"3"), (b"y", b"12", b"3"), (b"x", b"1", b"23"), (b"x", b"12", b"4")]
    assert len({write(*one) for one in contents}) == 4
    (tmp_path / "unlisted.png").write_bytes(b"not part of it")
    assert digest(tmp_path, ["a.png", "b.png"]) == write(b"x", b"12", b"4")
