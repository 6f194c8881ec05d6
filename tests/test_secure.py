"""Encryption: primitives, handshakes, records and letters; published vectors, and somebody on the wire who forges.

What needs libsodium is tried by both ways to it, and skipped where PyNaCl is not installed. The published vectors of
Noise are in a file that the environment variable NOISE_VECTORS names, those of the RFCs are here.
"""
from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import home
import secure
from home import fingerprint, sha256
from protocol import (BUNDLE_EXTRA, CONTINUES, HEADER_SIZE, KEY_BYTES, MAX_DATAGRAM, RECORD, RECORD_EXTRA,
                      REPLAY_WINDOW, STRING_HEADER, TAG_SIZE, Decoder, ReplayWindow, contents, index_of, is_nick,
                      letter_prologue)
from secure import (COUNTER_LIMIT, MAX_SEALED, PATTERNS, Channel, ChannelEnded, CipherState, Forged, HandshakeState,
                    KeyPair, Letters, Sodium, SymmetricState, bind_proof, compiled_sodium, hash_of, hmac_sha256,
                    is_bind_proof, load_sodium, public_sodium, static_secret, token_for)
from tests.processes import ROOT

Patch = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Sodium], None]

WAYS: dict[str, Callable[[], Sodium]] = {"compiled": compiled_sodium, "public": public_sodium}
TEXTS = st.binary(max_size=100)


@pytest.fixture(scope="module", params=WAYS)
def sodium(request: pytest.FixtureRequest) -> Sodium:
    """Return libsodium, by each of both ways to it."""
    pytest.importorskip("nacl.bindings", reason="PyNaCl is not installed: pip install 'udpchat[secure]'")
    return WAYS[request.param]()


def key(number: int) -> bytes:
    """Return 32 bytes that stand for random ones."""
    return sha256(b"%d" % number)


def pair(sodium: Sodium, number: int) -> KeyPair:
    """Return a key pair, always the same one for the same number."""
    return KeyPair(sodium, key(number))


ALICE, BOB, MALLORY, ALICE_ONCE, BOB_ONCE, MALLORY_ONCE = range(6)      # whose keys; "once": for one handshake


def handshake(sodium: Sodium, pattern: str = "IK", prologue: bytes = b"chat") -> tuple[HandshakeState, HandshakeState]:
    """Return a handshake from alice to bob that is about to begin, alice's side first."""
    alice, bob = pair(sodium, ALICE), pair(sodium, BOB)
    known = alice.public if pattern == "K" else b""
    return (HandshakeState(sodium, pattern, True, prologue, alice, bob.public),
            HandshakeState(sodium, pattern, False, prologue, bob, known))


def channels(sodium: Sodium) -> tuple[Channel, Channel]:
    """Return the two ends of a channel, alice's first."""
    alice, bob = handshake(sodium)
    bob.read(alice.write(b"", key(ALICE_ONCE)))
    alice.read(bob.write(b"", key(BOB_ONCE)))
    return Channel(alice.split(), b"aaaa", b"bbbb"), Channel(bob.split(), b"bbbb", b"aaaa")


def letter_of(letters: Letters, n: int, at: float, text: str, is_continued: bool) -> bytes:
    """Return one letter in a bundle of its own."""
    return letters.seal(n, [[at, 1]], [text], [n] if is_continued else ())


def opened(letters: Letters, n: int, letter: bytes) -> tuple[float, str, bool]:
    """Return the time and the text of one letter, and whether the next one continues it."""
    (time,), (text,), more = letters.open(n, letter)
    return time, text, n in more


def letters(sodium: Sodium, stream: int = 7, once: int = ALICE_ONCE) -> tuple[Letters, Letters]:
    """Return what seals the letters of a stream from alice to bob, and what opens them."""
    alice, bob = pair(sodium, ALICE), pair(sodium, BOB)
    prologue = letter_prologue(key(99), "alice", "bob", stream)
    sealing = Letters.to(sodium, alice, bob.public, prologue, key(once))
    return sealing, Letters.of(sodium, bob, alice.public, prologue, sealing.envelope)


def is_forged(function: Callable[..., object], *arguments: object) -> bool:
    """Return whether a call finds what it is handed forged; every other error comes through."""
    try:
        function(*arguments)
    except Forged:
        return True
    return False


# what somebody on the wire does to bytes: flip a bit, add some, cut them short, take one out, replace all
CHANGES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 8 * MAX_DATAGRAM)), st.tuples(st.just("add"), st.integers(1, 40)),
    st.tuples(st.sampled_from(("cut", "drop", "noise")), st.integers(0, MAX_DATAGRAM)))


def changed(data: bytes, change: tuple[str, int]) -> bytes:
    """Return other bytes than ``data``, made of them by one of ``CHANGES``."""
    kind, number = change
    at = number % len(data)
    if kind == "flip":
        bit = number % (8 * len(data))
        return data[:bit // 8] + bytes((data[bit // 8] ^ 1 << bit % 8,)) + data[bit // 8 + 1:]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + 1:]
    if kind == "add":
        return data + bytes(number)
    return b"".join(sha256(b"%d %d" % (number, part)) for part in range(-(-len(data) // 32)))[:len(data)]


# --- libsodium --------------------------------------------------------------------------------------------------

def test_x25519_calculates_what_rfc_7748_says(sodium: Sodium) -> None:
    for scalar, point, product in (
            ("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
             "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
             "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"),
            ("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
             "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
             "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957")):
        assert sodium.shared(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == product      # §5.2
    scalar_, point_ = (b"\x09" + bytes(31),) * 2
    for count in range(1000):
        scalar_, point_ = sodium.shared(scalar_, point_), scalar_
        if count == 0:
            assert scalar_.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert scalar_.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_two_agree_on_a_secret_as_in_rfc_7748(sodium: Sodium) -> None:
    alice = KeyPair(sodium, bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = KeyPair(sodium, bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"     # §6.1
    assert sodium.shared(alice.secret, bob.public).hex() == sodium.shared(bob.secret, alice.public).hex() == shared


def test_chacha20_poly1305_calculates_what_rfc_8439_says(sodium: Sodium) -> None:
    text = (b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen "
            b"would be it.")
    sealed = bytes.fromhex(
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71de0a9e06"
        "0b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def08e4b7a9de576d265"
        "86cec64b61161ae10b594f09e26a7e902ecbd0600691")                             # §2.8.2
    arguments = bytes(range(0x80, 0xa0)), bytes.fromhex("070000004041424344454647"), \
        bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    assert sodium.seal(*arguments, text) == sealed
    assert sodium.open(*arguments, sealed) == text


P = 2 ** 255 - 19
SMALL_ORDER = [number.to_bytes(32, "little") for number in (
    0, 1, P - 1, P, P + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823)]


@pytest.mark.parametrize("point", SMALL_ORDER, ids=range(len(SMALL_ORDER)))
def test_a_public_key_that_makes_every_secret_zero_is_refused(sodium: Sodium, point: bytes) -> None:
    with pytest.raises(Forged):
        sodium.shared(key(1), point)


@given(size=st.integers(0, 100))
def test_nothing_of_a_wrong_length_gets_to_libsodium(sodium: Sodium, size: int) -> None:
    wrong = bytes(size) if size != KEY_BYTES else b""
    nonce = bytes(size) if size != 12 else b""
    calls: list[tuple[Callable[..., bytes], tuple[bytes, ...]]] = [
        (sodium.public, (wrong,)), (sodium.shared, (wrong, key(1))), (sodium.shared, (key(1), wrong)),
        (sodium.seal, (wrong, bytes(12), b"", b"")), (sodium.open, (wrong, bytes(12), b"", bytes(16))),
        (sodium.seal, (key(1), nonce, b"", b"")), (sodium.open, (key(1), nonce, b"", bytes(16)))]
    for function, arguments in calls:
        with pytest.raises(ValueError):
            function(*arguments)


def test_what_is_too_long_is_not_sealed_and_the_longest_is(sodium: Sodium) -> None:
    longest = bytes(MAX_SEALED - TAG_SIZE)
    assert sodium.open(key(1), bytes(12), b"", sodium.seal(key(1), bytes(12), b"", longest)) == longest
    for data, text in ((b"", longest + b"x"), (bytes(MAX_SEALED + 1), b"")):
        with pytest.raises(ValueError):
            sodium.seal(key(1), bytes(12), data, text)


@given(sealed=st.one_of(st.binary(max_size=40), st.just(bytes(MAX_SEALED + 1))))
def test_bytes_that_nobody_sealed_are_forged_whatever_their_length(sodium: Sodium, sealed: bytes) -> None:
    with pytest.raises(Forged):
        sodium.open(key(1), bytes(12), b"", sealed)


def test_both_ways_to_libsodium_calculate_the_same(sodium: Sodium) -> None:
    other = compiled_sodium()
    assert sodium.public(key(1)) == other.public(key(1))
    for size in (0, 1, 63, 64, 65, 1200):
        arguments = key(1), bytes(12), b"data", bytes(size)
        assert sodium.seal(*arguments) == other.seal(*arguments)


@pytest.mark.parametrize("package", ["nacl", "nacl._sodium"])
def test_the_extra_is_not_there_where_pynacl_cannot_be_imported(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {package, "nacl._sodium", "nacl.bindings"}:
        monkeypatch.setitem(sys.modules, name, None)
    assert load_sodium() is None


def a_renamed_function() -> Sodium:
    """Do what happens if the compiled module has no function of a name that is used."""
    raise AttributeError("lib has no such function")


def another_number_of_arguments() -> Sodium:
    """Do what happens if a function of the compiled module has other arguments than before."""
    def fail(*_: bytes) -> bytes:
        raise TypeError("takes 9 arguments")
    return Sodium(fail, fail, fail, fail)


def other_results() -> Sodium:
    """Return a libsodium that calculates something else."""
    return Sodium(lambda secret: bytes(32), lambda *_: bytes(31) + b"x", lambda *_: bytes(16), lambda *_: b"")


@pytest.mark.parametrize("other", [a_renamed_function, another_number_of_arguments, other_results])
def test_another_compiled_module_than_the_expected_one_is_not_used(
        sodium: Sodium, other: Callable[[], Sodium], monkeypatch: pytest.MonkeyPatch) -> None:
    public = public_sodium()
    monkeypatch.setattr(secure, "compiled_sodium", other)
    monkeypatch.setattr(secure, "public_sodium", lambda: public)
    assert load_sodium() is public


def test_the_compiled_module_is_used_where_it_is_as_expected(sodium: Sodium, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_sodium()
    monkeypatch.setattr(secure, "compiled_sodium", lambda: compiled)
    assert load_sodium() is compiled


def test_who_does_not_ask_for_encryption_does_not_load_it() -> None:
    """Start-up is measured, and a PyNaCl that is broken must not end a program that does not need it."""
    assert loaded_by("import client, server, secure, udpchat", "nacl", "cffi", "hmac") == []


def test_what_is_slow_to_load_is_not_loaded_by_a_client() -> None:
    """Each of the two would be a twelfth of the time that ``udpchat send`` takes."""
    assert loaded_by("import client, udpchat", "typing") == []
    assert loaded_by("import secure; secure.token_for(bytes(32), bytes(16), 'bob')", "hashlib", "_hashlib") == []


def loaded_by(code: str, *modules: str) -> list[str]:
    """Return which of ``modules`` are loaded in a new interpreter that runs ``code``."""
    code += f"; import sys; print(*sorted({set(modules)} & set(sys.modules)))"
    alone = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]     # what an environment
    # loads for itself (an editable installation, say) is none of our business
    return subprocess.run(alone, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


# RFC 4231 §4.2, 4.3 and 4.7: a key, what is signed, the beginning of the signature
@pytest.mark.parametrize("signed_with, data, expected", [
    (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b"),
    (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c7"),
    (b"\xaa" * 131, b"Test Using Larger Than Block-Size Key - Hash Key First", "60e431591ee0b67f0d8a26aacbf5b77f"),
])
def test_hmac_is_that_of_the_rfc(signed_with: bytes, data: bytes, expected: str) -> None:
    assert hmac_sha256(signed_with, data).hex().startswith(expected)


@pytest.mark.parametrize("missing", [(), ("_sha2",), ("_sha2", "_sha256")])
def test_a_hash_is_the_same_whatever_module_has_it(missing: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    home._sha256_function.cache_clear()
    try:
        assert sha256(b"abc") == hashlib.sha256(b"abc").digest()        # FIPS 180-4 has this example
        assert len(missing) < 2 or home._sha256_function() is hashlib.sha256
    finally:
        home._sha256_function.cache_clear()


def test_pynacl_is_imported_in_one_function_of_one_module() -> None:
    users = {path.stem for path in ROOT.glob("*.py") if "nacl" in {
        part for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        and isinstance(node.value, str) for part in node.value.split(".")}}
    assert users == {"secure"}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("nacl", "cffi") for name in names), path


# --- keys -------------------------------------------------------------------------------------------------------

def test_the_static_key_comes_of_the_identity_and_is_no_token_of_any_nick_at_any_server() -> None:
    identity = key(1)
    assert static_secret(identity).hex() == "2b6ca40b7f9d902f1f02488a178870cd0daf291e2af46466d894a1927f77ed92"
    label = b"udpchat static key 1\0"
    assert token_for(identity, label[:16], label[16:].decode()) == static_secret(identity)     # if that were a nick
    assert not is_nick(label[16:].decode())


def test_a_proof_that_binds_a_key_is_good_for_that_nick_that_server_and_that_client_only() -> None:
    owner, server, client = hash_of(key(1)), key(2), key(3)
    proof = bind_proof(owner, server, client)
    assert is_bind_proof(proof, owner, server, client)
    for other in ((hash_of(key(4)), server, client), (owner, key(4), client), (owner, server, key(4))):
        assert not is_bind_proof(proof, *other)
    assert not is_bind_proof(proof[:-1], owner, server, client) and not is_bind_proof(b"", owner, server, client)
    assert key(1) not in proof


def test_a_fingerprint_is_sixty_digits_the_same_for_both_users_and_another_for_other_keys() -> None:
    seen = fingerprint(key(1), key(2))
    groups = seen.split(" ")
    assert [len(group) for group in groups] == [5] * 12 and "".join(groups).isdecimal()
    assert fingerprint(key(2), key(1)) == seen
    assert len({seen, fingerprint(key(1)), fingerprint(key(2)), fingerprint(key(1), key(3))}) == 4
    assert fingerprint(bytes(32)) == "91359 20401 69792 72179 30769 76244 19230 24689 30385 41598 25089 93684"


# --- handshakes -------------------------------------------------------------------------------------------------

def noise_vectors() -> list[dict[str, Any]]:
    """Return the published vectors, or skip the test that asks for them."""
    path = os.environ.get("NOISE_VECTORS")
    if not path:
        pytest.skip("the environment variable NOISE_VECTORS does not name a file with the published vectors")
    found: list[dict[str, Any]] = json.loads(Path(path).read_text())["vectors"]
    return found


class Side:
    """One side of a handshake of the published vectors."""

    def __init__(self, sodium: Sodium, vector: dict[str, Any], pattern: str, name: str) -> None:
        self.ephemeral = bytes.fromhex(vector.get(f"{name}_ephemeral", ""))
        self.handshake = HandshakeState(sodium, pattern, name == "init", bytes.fromhex(vector[f"{name}_prologue"]),
                                        KeyPair(sodium, bytes.fromhex(vector[f"{name}_static"])),
                                        bytes.fromhex(vector.get(f"{name}_remote_static", "")))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_handshakes_and_what_follows_are_those_of_the_published_vectors(sodium: Sodium, pattern: str) -> None:
    name = f"Noise_{pattern}_25519_ChaChaPoly_SHA256"
    vectors = [vector for vector in noise_vectors() if vector["protocol_name"] == name]
    assert vectors
    for vector in vectors:
        sides = [Side(sodium, vector, pattern, name) for name in ("init", "resp")]
        count = len(PATTERNS[pattern][1])
        for number, message in enumerate(vector["messages"]):
            sender = 0 if count == 1 else number % 2        # after K, only the initiator sends
            writer, reader = sides[sender], sides[1 - sender]
            payload = bytes.fromhex(message["payload"])
            if number < count:
                sent = writer.handshake.write(payload, writer.ephemeral)
                assert reader.handshake.read(sent) == payload
            else:
                if number == count:
                    ciphers = [side.handshake.split() for side in sides]
                sent = ciphers[sender][0].encrypt(b"", payload)
                assert ciphers[1 - sender][1].decrypt(b"", sent) == payload
            assert sent.hex() == message["ciphertext"]
        assert {side.handshake.symmetric.h.hex() for side in sides} == {vector["handshake_hash"]}


@pytest.mark.parametrize("pattern, expected", [
    ("IK", "f84a3a58139042bd98d55dc1c16489ea"), ("K", "d0d8598c2cc61769c3463ce32d80fc89")])
def test_a_handshake_has_the_same_bytes_in_all_versions(sodium: Sodium, pattern: str, expected: str) -> None:
    alice, bob = handshake(sodium, pattern)
    bob.read(alice.write(b"hello", key(ALICE_ONCE)))
    if pattern == "IK":
        alice.read(bob.write(b"hi", key(BOB_ONCE)))
    assert alice.symmetric.h == bob.symmetric.h
    assert sha256(alice.symmetric.h + alice.split()[0].encrypt(b"", b"text")).hex()[:32] == expected


@given(prologue=TEXTS, there=TEXTS, back=TEXTS, secrets=st.tuples(*[st.binary(min_size=32, max_size=32)] * 4))
def test_after_a_handshake_each_side_knows_the_other_and_opens_what_it_seals(
        sodium: Sodium, prologue: bytes, there: bytes, back: bytes, secrets: Sequence[bytes]) -> None:
    mine, yours = KeyPair(sodium, secrets[0]), KeyPair(sodium, secrets[1])
    alice = HandshakeState(sodium, "IK", True, prologue, mine, yours.public)
    bob = HandshakeState(sodium, "IK", False, prologue, yours)
    assert bob.read(alice.write(there, secrets[2])) == there
    assert bob.received["s"] == mine.public
    assert alice.read(bob.write(back, secrets[3])) == back
    assert alice.symmetric.h == bob.symmetric.h
    (to_bob, from_bob), (to_alice, from_alice) = alice.split(), bob.split()
    assert from_alice.decrypt(b"x", to_bob.encrypt(b"x", there)) == there
    assert from_bob.decrypt(b"y", to_alice.encrypt(b"y", back)) == back
    assert to_bob.key != to_alice.key


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nobody_but_the_one_that_was_meant_reads_a_handshake(sodium: Sodium, pattern: str) -> None:
    alice, _ = handshake(sodium, pattern)
    mallory = HandshakeState(sodium, pattern, False, b"chat", pair(sodium, MALLORY),
                             pair(sodium, ALICE).public if pattern == "K" else b"")
    message = alice.write(b"hello", key(ALICE_ONCE))
    assert is_forged(mallory.read, message)
    assert b"hello" not in message and pair(sodium, ALICE).public not in message


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sides_that_differ_in_the_prologue_do_not_agree(sodium: Sodium, pattern: str) -> None:
    alice, _ = handshake(sodium, pattern, b"chat")
    _, bob = handshake(sodium, pattern, b"chart")
    assert is_forged(bob.read, alice.write(b"hello", key(ALICE_ONCE)))


def test_somebody_else_cannot_write_a_letter_in_the_name_of_alice(sodium: Sodium) -> None:
    _, bob = handshake(sodium, "K")
    mallory = HandshakeState(sodium, "K", True, b"chat", pair(sodium, MALLORY), pair(sodium, BOB).public)
    assert is_forged(bob.read, mallory.write(b"", key(MALLORY_ONCE)))


def check_that_forged_messages_leave_no_trace(
        sodium: Sodium, changes: Sequence[tuple[str, int]] = (("flip", 1000), ("noise", 1), ("cut", 50))) -> None:
    """Read changed messages before each genuine one of an IK and a K handshake, which must all the same succeed."""
    for pattern in PATTERNS:
        alice, bob = handshake(sodium, pattern)
        first = alice.write(b"hello", key(ALICE_ONCE))
        for change in changes:
            assert is_forged(bob.read, changed(first, change))
            assert bob.step == 0
        assert not is_forged(bob.read, first), "the genuine message was not understood any more"
        assert is_forged(bob.read, first), "a message was read twice"
        if pattern == "IK":
            second = bob.write(b"hi", key(BOB_ONCE))
            for change in changes:
                assert is_forged(alice.read, changed(second, change))
            assert is_forged(alice.read, first)
            assert not is_forged(alice.read, second) and is_forged(alice.read, second)
        assert alice.symmetric.h == bob.symmetric.h and alice.split()[0].key == bob.split()[1].key


@given(changes=st.lists(CHANGES, min_size=1, max_size=5))
def test_forged_messages_of_a_handshake_are_found_and_leave_no_trace(
        sodium: Sodium, changes: list[tuple[str, int]]) -> None:
    check_that_forged_messages_leave_no_trace(sodium, changes)


@given(message=st.binary(max_size=200))
def test_a_message_of_random_bytes_is_forged(sodium: Sodium, message: bytes) -> None:
    for pattern in PATTERNS:
        assert is_forged(handshake(sodium, pattern)[1].read, message)


def test_a_message_that_is_longer_than_noise_allows_is_neither_read_nor_written(sodium: Sodium) -> None:
    alice, bob = handshake(sodium)
    for payload in (bytes(MAX_SEALED), bytes(MAX_SEALED - 96 + 1)):
        with pytest.raises(ValueError):
            alice.write(payload, key(ALICE_ONCE))
    assert alice.step == 0
    assert is_forged(bob.read, bytes(MAX_SEALED + 1))
    assert len(bob.read(alice.write(bytes(MAX_SEALED - 96), key(ALICE_ONCE)))) == MAX_SEALED - 96


def test_nothing_is_written_or_read_before_its_turn(sodium: Sodium) -> None:
    alice, bob = handshake(sodium)
    with pytest.raises(ValueError):
        bob.write(b"", key(BOB_ONCE))
    assert is_forged(alice.read, bytes(48))
    message = alice.write(b"hello", key(ALICE_ONCE))
    with pytest.raises(ValueError):
        alice.write(b"hello again", key(MALLORY_ONCE))
    assert bob.read(message) == b"hello"


@pytest.mark.parametrize("point", SMALL_ORDER, ids=range(len(SMALL_ORDER)))
def test_a_handshake_with_no_real_public_key_fails_without_a_trace(sodium: Sodium, point: bytes) -> None:
    alice, bob = handshake(sodium)
    message = alice.write(b"hello", key(ALICE_ONCE))
    assert is_forged(bob.read, point + message[32:])
    assert bob.read(message) == b"hello"
    towards_nobody = HandshakeState(sodium, "IK", True, b"chat", pair(sodium, ALICE), point)
    assert is_forged(towards_nobody.write, b"hello", key(ALICE_ONCE)) and towards_nobody.step == 0


@pytest.mark.parametrize("pattern, is_initiator, remote", [
    ("IK", True, b""), ("IK", False, bytes(32)), ("K", True, b""), ("K", False, b""), ("IK", True, bytes(31)),
    ("K", False, bytes(33))])
def test_a_handshake_does_not_begin_with_a_wrong_number_of_keys(
        sodium: Sodium, pattern: str, is_initiator: bool, remote: bytes) -> None:
    with pytest.raises(ValueError):
        HandshakeState(sodium, pattern, is_initiator, b"", pair(sodium, ALICE), remote)


# --- records ----------------------------------------------------------------------------------------------------

def test_a_record_is_thirty_bytes_longer_than_its_text_and_an_older_program_drops_it(sodium: Sodium) -> None:
    alice, bob = channels(sodium)
    first, second = alice.seal(5, b"hello"), alice.seal(6, b"hello")
    assert len(first) == len(b"hello") + 30 == len(b"hello") + RECORD_EXTRA
    assert first[:HEADER_SIZE] == b"\xc1\x05bbbb" + bytes(8) and second[:HEADER_SIZE] == b"\xc1\x06bbbb\x01" + bytes(7)
    assert first[HEADER_SIZE:] != second[HEADER_SIZE:] and b"hello" not in first
    assert index_of(first) == bob.index == b"bbbb"
    decoder = Decoder()
    assert decoder.decode(first) == [] and decoder.dropped == 1


@given(data=st.binary(max_size=60))
def test_the_index_of_a_record_is_found_and_nothing_else_has_one(data: bytes) -> None:
    is_record = len(data) >= RECORD_EXTRA and data[0] == RECORD
    assert index_of(data) == (data[2:6] if is_record else None)


def check_that_each_record_counts_once(sodium: Sodium, order: Sequence[int] = (1, 0, 1, 3, 3, 0, 2, 3, 1)) -> None:
    """Send records, let them arrive in the order of their numbers in ``order``, and compare what is opened."""
    alice, bob = channels(sodium)
    records = [alice.seal(0, b"text %d" % number) for number in range(max(order) + 1)]
    shown = []
    for number in order:
        if not is_forged(bob.open, records[number]):
            shown.append(number)
    assert shown == list(dict.fromkeys(order)), "a record counted twice, or not at all"


@given(order=st.lists(st.integers(0, 40), min_size=1, max_size=80))
def test_records_that_are_lost_repeated_or_reordered_count_once_each(sodium: Sodium, order: list[int]) -> None:
    check_that_each_record_counts_once(sodium, order)


@given(counters=st.lists(st.one_of(st.integers(0, 3 * REPLAY_WINDOW), st.integers(0, COUNTER_LIMIT - 1),
                                   st.sampled_from((0, REPLAY_WINDOW - 1, REPLAY_WINDOW, REPLAY_WINDOW + 1))),
                         max_size=40))
def test_the_window_knows_which_of_the_last_counters_have_come(counters: list[int]) -> None:
    window, come, highest = ReplayWindow(), set[int](), -1
    for counter in counters:
        expected = counter not in come and counter > highest - REPLAY_WINDOW
        assert window.is_new(counter) is window.is_new(counter) is expected     # to ask changes nothing
        if expected:
            window.add(counter)
            come.add(counter)
            highest = max(highest, counter)
        assert window.highest == highest


def test_the_window_is_as_wide_as_it_says_and_takes_no_more_memory_however_far_it_moves() -> None:
    window = ReplayWindow()
    for counter in (0, 5000, 5000 - REPLAY_WINDOW + 1, COUNTER_LIMIT - 1):
        assert window.is_new(counter)
        window.add(counter)
    assert not window.is_new(COUNTER_LIMIT - 1 - REPLAY_WINDOW) and window.is_new(COUNTER_LIMIT - REPLAY_WINDOW)
    assert max(value.bit_length() for value in vars(window).values()) <= REPLAY_WINDOW


def check_that_forged_records_leave_no_trace(
        sodium: Sodium, changes: Sequence[tuple[str, int]] = (("flip", 60), ("flip", 64), ("cut", 40))) -> None:
    """Let changed records arrive before each genuine one, which must all the same be opened."""
    alice, bob = channels(sodium)
    for text in (b"hello", b"", bytes(100)):
        record = alice.seal(1, text)
        before = bob.window.highest
        for change in changes:
            assert is_forged(bob.open, changed(record, change)), "a forged record was opened"
        assert bob.window.highest == before, "a forged record has moved the window"
        assert not is_forged(bob.open, record), "the genuine record was not opened any more"
        assert is_forged(bob.open, record), "a record was opened twice"


@given(changes=st.lists(CHANGES, min_size=1, max_size=8))
def test_forged_records_are_found_and_leave_no_trace(sodium: Sodium, changes: list[tuple[str, int]]) -> None:
    check_that_forged_records_leave_no_trace(sodium, changes)


@given(bit=st.integers(0, 8 * HEADER_SIZE - 1))
def test_nothing_before_the_text_of_a_record_can_be_changed(sodium: Sodium, bit: int) -> None:
    alice, bob = channels(sodium)
    check_that_forged_records_leave_no_trace(sodium, [("flip", bit)])
    assert is_forged(bob.open, changed(alice.seal(1, b"hello"), ("flip", bit)))


@given(data=st.binary(max_size=100))
def test_random_bytes_are_no_record(sodium: Sodium, data: bytes) -> None:
    _, bob = channels(sodium)
    assert is_forged(bob.open, data) and is_forged(bob.open, b"\xc1\x00bbbb" + data)


def test_a_record_counts_neither_at_its_sender_nor_in_another_channel(sodium: Sodium) -> None:
    alice, bob = channels(sodium)
    record = alice.seal(0, b"hello")
    assert is_forged(alice.open, record)
    assert is_forged(alice.open, record.replace(b"bbbb", b"aaaa"))      # sent back to alice under her own index
    mine, yours = handshake(sodium, prologue=b"the next one")
    yours.read(mine.write(b"", key(10)))
    mine.read(yours.write(b"", key(11)))
    assert is_forged(Channel(yours.split(), b"bbbb", b"aaaa").open, record)
    assert bob.open(record) == b"hello"


def test_a_channel_ends_with_a_clear_error_before_its_counters_do(sodium: Sodium) -> None:
    alice, bob = channels(sodium)
    ciphers = CipherState(sodium, key(1), COUNTER_LIMIT - 1), CipherState(sodium, key(2))
    full, other = Channel(ciphers, b"aaaa", b"bbbb"), Channel(ciphers[::-1], b"bbbb", b"aaaa")
    last = full.seal(0, b"the last one")
    for _ in range(2):
        with pytest.raises(ChannelEnded, match="another handshake"):
            full.seal(0, b"one more")
    assert other.open(last) == b"the last one"
    header = b"\xc1\x00bbbb" + COUNTER_LIMIT.to_bytes(8, "little")
    beyond = header + CipherState(sodium, key(1), COUNTER_LIMIT).encrypt(header, b"beyond")
    assert is_forged(other.open, beyond)


def test_an_index_has_four_bytes(sodium: Sodium) -> None:
    ciphers = CipherState(sodium, key(1)), CipherState(sodium, key(2))
    for ours, theirs in ((b"aaa", b"bbbb"), (b"aaaa", b"bbbbb")):
        with pytest.raises(ValueError):
            Channel(ciphers, ours, theirs)


# --- letters ----------------------------------------------------------------------------------------------------

@given(texts=st.lists(st.tuples(st.floats(allow_nan=False), st.text(max_size=50), st.booleans()), min_size=1),
       order=st.lists(st.integers(0, 5), max_size=12))
def test_letters_are_opened_in_any_order_and_as_often_as_they_come(
        sodium: Sodium, texts: list[tuple[float, str, bool]], order: list[int]) -> None:
    sealing, opening = letters(sodium)
    sealed = [letter_of(sealing, n, *text) for n, text in enumerate(texts, 1)]
    for number in order:
        at, text, is_continued = texts[number % len(texts)]
        n = number % len(texts) + 1
        assert opened(opening, n, sealed[n - 1]) == (at, text, is_continued)
        assert letter_of(sealing, n, at, text, is_continued) == sealed[n - 1]         # whatever was sealed before
        assert len(sealed[n - 1]) <= len(text.encode()) + STRING_HEADER + BUNDLE_EXTRA


@given(texts=st.lists(st.text(max_size=50), min_size=1, max_size=60), first=st.integers(1, 2 ** 62),
       times=st.lists(st.floats(0, 1e10), min_size=1, max_size=5), continued=st.sets(st.integers(-1, 60)))
def test_a_bundle_has_its_texts_and_times_and_what_goes_on(
        sodium: Sodium, texts: list[str], first: int, times: list[float], continued: set[int]) -> None:
    sealing, opening = letters(sodium)
    lengths = [len(texts) // len(times) + (n < len(texts) % len(times)) for n in range(len(times))]
    more = {first + place for place in continued}
    runs = [[at, length] for at, length in zip(times, lengths) if length]
    bundle = sealing.seal(first, runs, texts, more)
    found = opening.open(first, bundle)
    goes_on = frozenset(n for n in range(first - 1, first + len(texts)) if n in more)
    at = [time for time, length in zip(times, lengths) for _ in range(length)]
    assert found[1:] == (texts, goes_on)
    assert found[0] == [CONTINUES if n - 1 in more else at for n, at in enumerate(at, first)]
    assert is_forged(opening.open, first + 1, bundle) and is_forged(opening.open, first - 1, bundle)


@given(change=CHANGES)
def test_a_letter_that_was_changed_or_has_another_number_is_forged(sodium: Sodium, change: tuple[str, int]) -> None:
    sealing, opening = letters(sodium)
    letter = letter_of(sealing, 5, 1e9, "hello", True)
    for n, sealed in ((5, changed(letter, change)), (6, letter), (0, letter), (2 ** 63, letter),
                      (5, b"\2" + letter[1:])):
        assert is_forged(opening.open, n, sealed)
    assert opened(opening, 5, letter) == (1e9, "hello", True)


@given(change=CHANGES)
def test_an_envelope_that_was_changed_is_forged(sodium: Sodium, change: tuple[str, int]) -> None:
    alice, bob = pair(sodium, ALICE), pair(sodium, BOB)
    envelope = Letters.to(sodium, alice, bob.public, b"", key(ALICE_ONCE)).envelope
    assert len(envelope) == 48
    assert is_forged(Letters.of, sodium, bob, alice.public, b"", changed(envelope, change))


def test_letters_belong_to_one_server_sender_recipient_and_stream(sodium: Sodium) -> None:
    alice, bob, mallory = pair(sodium, ALICE), pair(sodium, BOB), pair(sodium, MALLORY)
    right = letter_prologue(key(99), "alice", "bob", 7)
    envelope = Letters.to(sodium, alice, bob.public, right, key(ALICE_ONCE)).envelope
    assert not is_forged(Letters.of, sodium, bob, alice.public, letter_prologue(key(99), "alice", "bob", 7), envelope)
    for wrong in (letter_prologue(key(99), "Alice", "bob", 7), letter_prologue(key(99), "alice", "BOB", 7),
                  letter_prologue(key(98), "alice", "bob", 7), letter_prologue(key(99), "alicia", "bob", 7),
                  letter_prologue(key(99), "alice", "bobby", 7), letter_prologue(key(99), "alice", "bob", 8),
                  letter_prologue(key(99), "bob", "alice", 7)):
        assert is_forged(Letters.of, sodium, bob, alice.public, wrong, envelope)
    assert is_forged(Letters.of, sodium, bob, mallory.public, right, envelope)
    assert is_forged(Letters.of, sodium, mallory, alice.public, right, envelope)


def test_a_user_can_seal_letters_to_oneself(sodium: Sodium) -> None:
    alice = pair(sodium, ALICE)
    sealing = Letters.to(sodium, alice, alice.public, b"", key(ALICE_ONCE))
    opening = Letters.of(sodium, alice, alice.public, b"", sealing.envelope)
    assert opened(opening, 1, letter_of(sealing, 1, 0.0, "note", False)) == (0.0, "note", False)


GOOD = contents(["x"], [[1.5, 1]], [])


@pytest.mark.parametrize("content", [
    b"", b"\xc1", GOOD[:-1], GOOD * 2, msgpack.packb(5), msgpack.packb([["x"], [[1.5, 1]]]), contents(["x"], [], []),
    contents(["x"], [[1.5, 2]], []), contents(["x"], [[1.5, 1]], [0]), contents(["x", "y"], [[1.5, 2]], []),
    contents([b"x"], [[1.5, 1]], []), contents(["x"], [[1.5, 1.0]], []), GOOD.replace(b"x", b"\xff"),   # type: ignore
    contents(["x" * 769], [[1.5, 1]], []), b"\x91" * 2000])
def test_a_letter_of_a_sender_who_has_sealed_something_else_is_forged(sodium: Sodium, content: bytes) -> None:
    sealing, opening = letters(sodium)
    for what, is_good in ((content, False), (GOOD, True)):
        sealed = b"\1\0" + sodium.seal(sealing._key, b"\1\0\0\0\5" + bytes(7), b"", what)
        assert is_forged(opening.open, 5, sealed) is not is_good


def test_an_envelope_that_has_something_in_it_is_forged(sodium: Sodium) -> None:
    alice, bob = handshake(sodium, "K")
    filled = alice.write(b"x", key(ALICE_ONCE))
    assert is_forged(Letters.of, sodium, pair(sodium, BOB), pair(sodium, ALICE).public, b"chat", filled)


def test_no_letter_is_sealed_to_what_is_no_public_key(sodium: Sodium) -> None:
    assert is_forged(Letters.to, sodium, pair(sodium, ALICE), bytes(32), b"", key(ALICE_ONCE))


# --- nonces -----------------------------------------------------------------------------------------------------

class Recorder(Sodium):
    """Libsodium, and all that was sealed with it: a nonce that is used for two different texts is an error."""

    def __init__(self, sodium: Sodium) -> None:
        vars(self).update(vars(sodium))
        self.sealed: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}

    def seal(self, key: bytes, nonce: bytes, data: bytes, text: bytes) -> bytes:
        """Seal, and remember what."""
        assert self.sealed.setdefault((key, nonce), (data, text)) == (data, text), "a nonce was used for two texts"
        return super().seal(key, nonce, data, text)


SCRIPT = tuple((action, b"%d" % number) for number, action in enumerate((0, 1, 2, 3, 4, 0, 1, 2, 3, 4)))


def check_that_no_nonce_is_used_twice(sodium: Sodium, script: Sequence[tuple[int, bytes]] = SCRIPT) -> None:
    """Do what ``script`` says with each text: 0, 1: alice or bob sends it; 2, 3: it goes into a letter of one of two
    streams; 4: another handshake carries it."""
    recorder = Recorder(sodium)
    alice, bob = channels(recorder)
    streams = letters(recorder, 7, 20)[0], letters(recorder, 8, 21)[0]
    for number, (action, text) in enumerate(script):
        if action < 2:
            (alice, bob)[action].seal(number % 3, text)
        elif action < 4:
            letter_of(streams[action - 2], number + 1, float(number), text.hex(), number % 2 == 0)
        else:
            mine, yours = handshake(recorder, prologue=text)
            assert is_forged(yours.read, bytes(200))
            yours.read(mine.write(text, key(30 + 2 * number)))
            assert is_forged(mine.read, bytes(200))
            mine.read(yours.write(text, key(31 + 2 * number)))


@given(script=st.lists(st.tuples(st.integers(0, 4), TEXTS), max_size=15))
def test_no_nonce_is_used_for_two_texts(sodium: Sodium, script: list[tuple[int, bytes]]) -> None:
    check_that_no_nonce_is_used_twice(sodium, script)


def test_a_number_whose_text_could_not_be_sealed_is_not_used_again(sodium: Sodium) -> None:
    alice, bob = channels(sodium)
    with pytest.raises(ValueError):
        alice.seal(0, bytes(MAX_SEALED))
    assert alice.seal(0, b"hello")[6:14] == b"\1" + bytes(7)


# --- faults that are found --------------------------------------------------------------------------------------

def uses_a_nonce_twice(patch: pytest.MonkeyPatch) -> None:
    """Do not count what is sealed."""
    def encrypt(self: CipherState, data: bytes, text: bytes) -> bytes:
        n = self.n
        sealed = original(self, data, text)
        self.n = n
        return sealed
    original = CipherState.encrypt
    patch.setattr(CipherState, "encrypt", encrypt)


def shares_a_key_between_streams(patch: pytest.MonkeyPatch) -> None:
    """Use the same ephemeral secret for each handshake."""
    original = HandshakeState.write
    patch.setattr(HandshakeState, "write", lambda self, payload, secret: original(self, payload, key(1)))


def has_no_replay_window(patch: pytest.MonkeyPatch) -> None:
    """Take every counter as a new one."""
    patch.setattr(ReplayWindow, "is_new", lambda self, counter: True)


def moves_the_window_before_the_tag(patch: pytest.MonkeyPatch) -> None:
    """Remember a counter as soon as it comes."""
    def is_new(self: ReplayWindow, counter: int) -> bool:
        if not original(self, counter):
            return False
        self.add(counter)
        return True
    original = ReplayWindow.is_new
    patch.setattr(ReplayWindow, "is_new", is_new)


def reads_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let a message that does not verify change the state of a handshake."""
    patch.setattr(SymmetricState, "copy", lambda self: self)


def does_not_authenticate_the_header(patch: pytest.MonkeyPatch) -> None:
    """Seal the text of a record alone."""
    seal, open_ = Sodium.seal, Sodium.open
    patch.setattr(Sodium, "seal", lambda self, key, nonce, data, text: seal(self, key, nonce, b"", text))
    patch.setattr(Sodium, "open", lambda self, key, nonce, data, text: open_(self, key, nonce, b"", text))


def check_the_kind(sodium: Sodium) -> None:
    """Change the kind of a record, which nothing but its authentication protects."""
    check_that_forged_records_leave_no_trace(sodium, [("flip", 8)])


@pytest.mark.parametrize("fault, check", [
    (uses_a_nonce_twice, check_that_no_nonce_is_used_twice),
    (shares_a_key_between_streams, check_that_no_nonce_is_used_twice),
    (has_no_replay_window, check_that_each_record_counts_once),
    (moves_the_window_before_the_tag, check_that_forged_records_leave_no_trace),
    (reads_in_place, check_that_forged_messages_leave_no_trace),
    (does_not_authenticate_the_header, check_the_kind),
])
def test_an_encryption_that(fault: Patch, check: Check, sodium: Sodium) -> None:
    check(sodium)
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises((AssertionError, Forged)):
            check(sodium)
