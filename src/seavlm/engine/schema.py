"""A JSON schema made ready for llguidance, or refused by the part that cannot be held to.

llguidance holds replies to most of draft 2020-12, and refuses most of the rest. Here is what it would let by:
numbers beyond a double, names that come twice, dates and times that do not exist, patterns that Rust reads
otherwise than ECMA-262, `oneOf`; and what needs no refusing: words without effect, formats that no draft
knows, references by URI. A reply can then be narrower than the schema, never wider.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

from seavlm.errors import SeavlmError

MAX_PROPERTIES, MAX_PARTS, MAX_DEPTH = 3000, 100_000, 200
EXACT = 2**53  # integers up to here are exact in a double
DATA = ("enum", "const", "default", "examples", "example")  # not schemas
ONE = ("items", "additionalItems", "additionalProperties")
LISTS = ("prefixItems", "items", "allOf", "anyOf", "oneOf")
MAPS = ("properties", "patternProperties")
SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
BASE = "seavlm:/schema"
CONTROL = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")

UNHELD = {
    "not": "Say what may be, instead of what may not.",
    "if": "Use anyOf with one option for each case.",
    "dependentRequired": "Use anyOf with one option for each case.",
    "dependentSchemas": "Use anyOf with one option for each case.",
    "dependencies": "Use anyOf with one option for each case.",
    "contains": "Use prefixItems for the item that must be there.",
    "uniqueItems": "Leave it out and drop what comes twice, or use an object of booleans.",
    "propertyNames": "Use patternProperties, with additionalProperties false.",
    "unevaluatedProperties": "Use additionalProperties, beside all the properties.",
    "unevaluatedItems": "Use items, beside prefixItems.",
    "$dynamicRef": "Use $ref.",
    "$recursiveRef": "Use $ref.",
    "extends": "Use allOf.",
    "disallow": "Say what may be, instead of what may not.",
    "divisibleBy": "Use multipleOf.",
}
IGNORED: tuple[str, ...] = ("$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
IGNORED += (
    "$vocabulary",
    "x-guidance",
    "default",
    "examples",
    "example",
    "minContains",
    "maxContains",
    "then",
    "else",
)  # these, alone

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # Python's dates begin at 1
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_HEX = "%[0-9a-fA-F]{2}"
_SEGMENT = rf"(?:[a-zA-Z0-9\-._~!$&'()*+,;=:@]|{_HEX})"
_FIRST = rf"(?:[a-zA-Z0-9\-._~!$&'()*+,;=@]|{_HEX})"  # no colon: that would end a scheme
_HOST = (
    rf"//(?:(?:[a-zA-Z0-9\-._~!$&'()*+,;=:]|{_HEX})*@)?(?:[a-zA-Z0-9\-._~!$&'()*+,;=]|{_HEX})*(?::[0-9]*)?"
)
_REFERENCE = (
    rf"(?:[a-zA-Z][a-zA-Z0-9+.\-]*:)?"
    rf"(?:{_HOST}(?:/{_SEGMENT}*)*|/(?:{_SEGMENT}+(?:/{_SEGMENT}*)*)?|{_FIRST}+(?:/{_SEGMENT}*)*)?"
    rf"(?:\?(?:{_SEGMENT}|[/?])*)?(?:#(?:{_SEGMENT}|[/?])*)?"
)
_VARIABLE = r"[a-zA-Z0-9_]+(?:\.[a-zA-Z0-9_]+)*(?::[1-9][0-9]{0,3}|\*)?"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

# What a format becomes: schemas that llguidance holds to. Some are narrower than the format: no leap seconds,
# and of the international ones those without other letters.
FORMATS: dict[str, list[dict[str, Any]]] = {
    "date": [{"pattern": f"^{_DATE}$"}],
    "time": [{"pattern": f"^{_TIME}$"}],
    "date-time": [{"pattern": f"^{_DATE}T{_TIME}$"}],
    "hostname": [{"format": "hostname"}, {"pattern": "^[^-]+(?:-[^-]+)*$", "maxLength": 253}],
    "uri-reference": [{"pattern": f"^{_REFERENCE}$"}],
    "uri-template": [
        {
            "pattern": rf"^(?:[a-zA-Z0-9\-._~:/?#\[\]@!$&()*+,;=]|{_HEX}"
            rf"|\{{[+#./;?&]?{_VARIABLE}(?:,{_VARIABLE})*\}})*$"
        }
    ],
    "json-pointer": [{"pattern": f"^{_POINTER}$"}],
    "relative-json-pointer": [{"pattern": f"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$"}],
    **{name: [{"format": name}] for name in ("duration", "email", "ipv4", "ipv6", "uuid", "uri")},
}
FORMATS |= {
    "idn-hostname": FORMATS["hostname"],
    "idn-email": FORMATS["email"],
    "iri": FORMATS["uri"],
    "iri-reference": FORMATS["uri-reference"],
}


def ready(schema: Any) -> dict[str, Any]:
    """The schema as llguidance may have it: closed, plain, with references by pointer. SeavlmError names the
    part that cannot be held to."""
    if schema is True:
        return {}
    _check_size(schema)
    given = _Document(schema)
    made = _Document(_closed(schema))
    _Walk(made, given).visit(made.root, "", "")
    return made.root


def _check_size(schema: Any) -> None:
    """Compiling takes the square of the properties' number, and more of the stack the deeper a schema is."""
    found, count, parts = [(schema, 0)], 0, 0
    while found:
        part, depth = found.pop()
        children = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict) and isinstance(part.get("properties"), dict):
            count += len(part["properties"])
        parts += 1
        if count > MAX_PROPERTIES or parts > MAX_PARTS or depth > MAX_DEPTH:
            raise refused(
                "",
                f"more than {MAX_PROPERTIES:,} properties, {MAX_PARTS:,} parts or {MAX_DEPTH} levels",
                "Ask for less at once.",
            )
        found += ((child, depth + 1) for child in children)


def blame(schema: dict[str, Any], fault: Callable[[dict[str, Any]], str]) -> str:
    """Pointer of the smallest part of a schema made ready that has the same fault (a text; "": none)."""
    until = time.monotonic() + 1  # as long as one looks for it

    def kind(part: dict[str, Any]) -> str:
        return "nothing" if (found := fault(part)).startswith("Unsatisfiable") else found

    told = kind(schema)
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def same(part: Any) -> bool:
        return time.monotonic() < until and isinstance(part, dict) and kind({**shared, **part}) == told

    part, at, seen = schema, "", set[str]()
    while at not in seen:
        seen.add(at)
        reference = part.get("$ref")
        places = [(at + step, child) for step, child in _parts(part)]
        if isinstance(reference, str):
            pointer = unquote(reference[1:])
            places.append((pointer, _resolve(schema, pointer)))
        for there, child in places:
            if same(child):
                part, at = child, there
                break
    for word in sorted(part, key=lambda word: word == "type"):
        if word not in shared and not same({key: value for key, value in part.items() if key != word}):
            return f"{at}/{word}" if time.monotonic() < until else at
    return at


def refused(at: str, why: str, hint: str) -> SeavlmError:
    return SeavlmError(f"the JSON schema cannot be held to: #{at}: {why}", hint=hint)


class _Document:
    """A schema, and what its references mean. Pointers are as in URIs, without the #."""

    def __init__(self, root: Any) -> None:
        if not isinstance(root, dict):
            raise refused(
                "", "a schema is an object" if root is not False else "false allows nothing", "Mend it."
            )
        self.root: dict[str, Any] = root
        self.bases: dict[int, str] = {}  # of each part, its base URI
        self._names: dict[str, list[tuple[str, Any]]] = {BASE: [("", root)]}  # URI -> (pointer, part)
        self._collect(root, "", BASE)

    def _collect(self, part: Any, at: str, base: str) -> None:
        if isinstance(part, dict):
            name = part.get("$id", part.get("id"))
            if isinstance(name, str):
                uri, anchor = urldefrag(urljoin(base, name))
                self._names.setdefault(f"{uri}#{anchor}" if anchor else uri, []).append((at, part))
                base = base if anchor else uri
            for word in ("$anchor", "$dynamicAnchor"):
                if isinstance(part.get(word), str):
                    self._names.setdefault(f"{base}#{part[word]}", []).append((at, part))
            self.bases[id(part)] = base
        for key, value in _items(part):
            if key not in DATA:
                self._collect(value, f"{at}/{_escaped(key)}", base)

    def find(self, reference: str, part: Any) -> tuple[str, Any] | None:
        """(pointer, part) that a reference in `part` means."""
        uri, fragment = urldefrag(urljoin(self.bases.get(id(part), BASE), reference))
        if not uri and reference.startswith("#"):  # urljoin keeps no fragment on some schemes
            uri = self.bases.get(id(part), BASE)
        named = fragment and not fragment.startswith("/")
        places = self._names.get(f"{uri}#{unquote(fragment)}" if named else uri, [])
        if len({at for at, _ in places}) != 1:
            return None
        at, found = places[0]
        for name in unquote(fragment).split("/")[1:] if not named else ():
            key = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                return None
            at += f"/{_escaped(key)}"
        return at, found


class _Walk:
    """Goes through the parts that count, making them ready in place."""

    def __init__(self, made: _Document, given: _Document) -> None:
        self.made, self.given = made, given
        self.seen: set[int] = set()
        self.old = bool(re.search(r"draft-0|2019-09", str(given.root.get("$schema"))))

    def visit(self, part: Any, at: str, origin: str) -> None:
        """at: where it was found. origin: its pointer in the document."""
        if isinstance(part, bool):
            return
        if not isinstance(part, dict):
            raise refused(at, "a schema is an object or a boolean", "Mend it.")
        if id(part) in self.seen:
            return
        self.seen.add(id(part))
        self._reword(part)
        for step, child in _parts(part):
            self.visit(child, at + step, origin + step)
        self._reference(part, at)
        self._words(part, at)
        self._values(part, at)
        self._one_of(part, at, origin)
        for key in ("pattern", "format"):
            self._text(part, key, f"{at}/{key}")
        named = part.get("patternProperties")
        if isinstance(named, dict):
            part["patternProperties"] = {
                ecma(str(name), f"{at}/patternProperties/{_escaped(name)}"): value
                for name, value in named.items()
            }

    def _reword(self, part: dict[str, Any]) -> None:
        """The same in words that can be held to."""
        for word in ("dependentRequired", "dependencies"):
            needs = part.get(word)
            if (
                isinstance(needs, dict)
                and len(needs) <= 6
                and all(isinstance(n, list) for n in needs.values())
            ):
                del part[word]
                for name, others in needs.items():
                    if others:
                        cases = [{"properties": {name: False}}, {"required": others}]
                        _also(part, {"anyOf": cases})
        refusal = part.get("not")
        names = refusal.get("required") if isinstance(refusal, dict) and len(refusal) == 1 else None
        if isinstance(names, list) and 0 < len(names) <= 6:
            del part["not"]
            _also(part, {"type": "object", "anyOf": [{"properties": {str(name): False}} for name in names]})
        named = part.get("propertyNames")
        if isinstance(named, dict) and isinstance(named.get("$ref"), str) and len(named) == 1:
            named = (self.made.find(named["$ref"], named) or ("", None))[1]
        if isinstance(named, dict) and not ("properties" in part or "patternProperties" in part):
            told = set(named) - {"type", "title", "description"}
            value = part.get("additionalProperties", True)
            if told == {"pattern"} and isinstance(named["pattern"], str):
                part["patternProperties"] = {named["pattern"]: value}
            elif told == {"enum"} and isinstance(named["enum"], list):
                part["properties"] = {name: value for name in named["enum"] if isinstance(name, str)}
            else:
                return
            del part["propertyNames"]
            part["additionalProperties"] = False

    def _reference(self, part: dict[str, Any], at: str) -> None:
        reference = part.get("$ref")
        if not isinstance(reference, str):
            return
        found = self.made.find(reference, part)
        if found is None:
            raise refused(
                f"{at}/$ref",
                f"{reference[:100]!r} is not in the schema",
                "Put it under $defs and refer to it as #/$defs/ and its name.",
            )
        part["$ref"] = "#" + quote(found[0], safe="/~$")
        self.made.bases[id(part)] = BASE
        self.visit(found[1], found[0], found[0])

    def _words(self, part: dict[str, Any], at: str) -> None:
        """Those without effect go, and others are refused."""
        if part.get("if") is not None and "then" not in part and "else" not in part:
            del part["if"]
        plain = not any(
            word in part for word in ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
        )
        if plain and part.get("unevaluatedProperties") is False:
            del part["unevaluatedProperties"]
            part.setdefault("additionalProperties", False)
        if plain and part.get("unevaluatedItems") is False and not isinstance(part.get("items"), list):
            del part["unevaluatedItems"]
            part.setdefault("items", False)
        for word in [word for word in part if word in UNHELD]:
            if not _idle(part, word):
                raise refused(f"{at}/{word}", f"replies cannot be held to {word}", UNHELD[word])
            del part[word]
        for word in IGNORED:
            part.pop(word, None)
        if self.old and "prefixItems" in part:
            raise refused(
                f"{at}/prefixItems",
                "it is of draft 2020-12, and $schema names an older one",
                "Name that one.",
            )

    def _values(self, part: dict[str, Any], at: str) -> None:
        for key in SIZES:
            if isinstance(part.get(key), float) and part[key].is_integer():
                part[key] = int(part[key])
            _exact(part.get(key), f"{at}/{key}")
        for key in BOUNDS:
            if key in part:
                _exact(part[key], f"{at}/{key}")
                part[key] = _whole(part[key])
        if part.get("type") != "integer":
            _inward(part, "minimum", "exclusiveMinimum", 1)
            _inward(part, "maximum", "exclusiveMaximum", -1)
        if "const" in part:
            _exact(part["const"], f"{at}/const")
        for number, value in enumerate(part["enum"] if isinstance(part.get("enum"), list) else ()):
            _exact(value, f"{at}/enum/{number}")
        least, required = part.get("minProperties"), part.get("required")
        sure = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int) and least > sure + 1:
            raise refused(
                f"{at}/minProperties",
                "a name might come twice, and then there are too few",
                "Name the properties in required, or ask for fewer.",
            )

    def _text(self, part: dict[str, Any], key: str, at: str) -> None:
        """Patterns as Rust reads them, formats as what can be held to."""
        value = part.get(key)
        if not isinstance(value, str):
            return
        if key == "pattern":
            part[key] = ecma(value, at)
            return
        if value == "regex":
            raise refused(at, "replies cannot be held to the format regex", "Leave it out.")
        del part["format"]
        if value in FORMATS:
            parts = [
                {**one, "pattern": ecma(one["pattern"], at)} if "pattern" in one else one
                for one in FORMATS[value]
            ]
            _also(part, *parts)

    def _one_of(self, part: dict[str, Any], at: str, origin: str) -> None:
        options = part.get("oneOf")
        if not isinstance(options, list):
            return
        known = _resolve(self.given.root, origin)
        before = known.get("oneOf") if isinstance(known, dict) else None
        if not isinstance(before, list) or len(before) != len(options):
            before = options
        for i, option in enumerate(options):
            for j, other in enumerate(before):
                if i != j and not _apart(_Facts(self.made, option), _Facts(self.given, other)):
                    first, second = sorted((i, j))
                    raise refused(
                        f"{at}/oneOf",
                        f"a reply may be of its options {first} and {second} at once",
                        "Use anyOf, or give each option a required property with another const.",
                    )
        del part["oneOf"]
        if "anyOf" in part:
            _also(part, {"anyOf": options})
        else:
            part["anyOf"] = options


class _Facts:
    """What is known of the values that a schema allows."""

    def __init__(self, document: _Document, schema: Any, depth: int = 0) -> None:
        self.document, self.depth = document, depth
        self.parts: list[dict[str, Any]] = []  # all of them hold
        self.nothing = False
        self._gather(schema, 0)

    def _gather(self, schema: Any, steps: int) -> None:
        if schema is False:
            self.nothing = True
        if not isinstance(schema, dict) or steps > 20:
            return
        self.parts.append(schema)
        if isinstance(schema.get("$ref"), str) and (found := self.document.find(schema["$ref"], schema)):
            self._gather(found[1], steps + 1)
        for other in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
            self._gather(other, steps + 1)

    def types(self) -> set[str]:
        found = {"null", "boolean", "number", "string", "array", "object"}
        for part in self.parts:
            told = part.get("type")
            if isinstance(told, str | list):
                names = [told] if isinstance(told, str) else told
                found &= {"number" if name == "integer" else str(name) for name in names}
            values = self._told(part)
            if values is not None:
                found &= {_type(value) for value in values}
        return found

    @staticmethod
    def _told(part: dict[str, Any]) -> list[Any] | None:
        if "const" in part:
            return [part["const"]]
        return part["enum"] if isinstance(part.get("enum"), list) else None

    def values(self) -> set[str] | None:
        """All that may be, where there are not many."""
        for part in self.parts:
            if (told := self._told(part)) is not None:
                return {_key(value) for value in told}
        types = self.types()
        if types <= {"null", "boolean"}:
            return {text for name, text in (("null", "null"), ("boolean", "false")) if name in types} | (
                {"true"} if "boolean" in types else set()
            )
        return None

    def required(self) -> set[str]:
        lists = [part["required"] for part in self.parts if isinstance(part.get("required"), list)]
        return {name for names in lists for name in names if isinstance(name, str)}

    def property(self, name: str) -> _Facts:
        found = _Facts(self.document, True, self.depth + 1)
        for part in self.parts:
            properties = part.get("properties")
            if isinstance(properties, dict) and name in properties:
                found._gather(properties[name], 0)
            elif "patternProperties" not in part and "additionalProperties" in part:
                found._gather(part["additionalProperties"], 0)
        return found

    def options(self) -> list[Any] | None:
        for part in self.parts:
            for word in ("anyOf", "oneOf"):
                if isinstance(part.get(word), list):
                    return part[word]
        return None

    def bounds(self) -> tuple[float, float]:
        low, high = float("-inf"), float("inf")
        for part in self.parts:
            numbers = [value for value in self._told(part) or () if _type(value) == "number"]
            lows, highs = [part.get("minimum")], [part.get("maximum")]
            if numbers:
                lows, highs = [*lows, min(numbers)], [*highs, max(numbers)]
            low = max([low, *(value for value in lows if isinstance(value, int | float))])
            high = min([high, *(value for value in highs if isinstance(value, int | float))])
        return low, high


def _apart(one: _Facts, other: _Facts) -> bool:
    """No value is of both, for sure."""
    if one.nothing or other.nothing:
        return True
    if max(one.depth, other.depth) > 6:
        return False
    if not (common := one.types() & other.types()):
        return True
    mine, theirs = one.values(), other.values()
    if mine is not None and theirs is not None and not mine & theirs:
        return True
    if common == {"object"} and any(
        _apart(one.property(name), other.property(name)) for name in one.required() | other.required()
    ):
        return True
    (low, high), (least, most) = one.bounds(), other.bounds()
    if common == {"number"} and (high < least or most < low):
        return True
    for this, that in ((one, other), (other, one)):
        options = this.options()
        if options is not None and all(
            _apart(_Facts(this.document, option, this.depth + 1), that) for option in options
        ):
            return True
    return False


def _inward(part: dict[str, Any], bound: str, beyond: str, sign: int) -> None:
    """Bounds that llguidance keeps to: it lets 3 be more than 3 where 3.3 is the most, and rounds the 16th
    digit. A bound that is not itself allowed moves in by a billionth, or by its 12th digit."""
    found = []
    if isinstance(part.get(beyond), bool) and part.pop(beyond) and bound in part:  # draft 4
        part[beyond] = part.pop(bound)
    for key in (bound, beyond):
        if _type(part.get(key)) == "number":
            value = Decimal(repr(part.pop(key)))
            if key == beyond:
                value += sign * (abs(value).scaleb(-12) or Decimal("1e-9"))
            excess = len(value.as_tuple().digits) - 15
            if excess > 0:
                step = Decimal(1).scaleb(value.adjusted() - 14)
                value = value.quantize(step, ROUND_CEILING if sign > 0 else ROUND_FLOOR)
            found.append(value)
    if found:
        part[bound] = _whole(float(max(found) if sign > 0 else min(found)))


def _also(part: dict[str, Any], *others: dict[str, Any]) -> None:
    given = part.get("allOf", [])
    part["allOf"] = [*(given if isinstance(given, list) else [given]), *others]


def _idle(part: dict[str, Any], word: str) -> bool:
    """This word of UNHELD says nothing."""
    value = part[word]
    if word == "uniqueItems":
        return value is False or part.get("maxItems") in (0, 1)
    if word in ("unevaluatedProperties", "unevaluatedItems", "propertyNames"):
        return value is True or value == {}
    if word.startswith("depend"):
        return isinstance(value, dict) and all(one is True or one in ([], {}) for one in value.values())
    return word == "not" and value is False


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _key(value: Any) -> str:
    """Equal for equal values."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return {k: _whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def _exact(value: Any, at: str) -> None:
    """SeavlmError for numbers that a double does not hold, and for texts that llguidance writes otherwise."""
    if isinstance(value, int | float) and not abs(value) <= EXACT:
        raise refused(at, "numbers are held to up to 2^53", "Use a smaller one, or a string.")
    if isinstance(value, str) and CONTROL.search(value):
        raise refused(at, "control characters cannot be written", "Leave them out.")
    for key, inner in _items(value):
        if isinstance(value, dict):
            _exact(key, at)
        _exact(inner, f"{at}/{_escaped(key)}")


def _items(part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, dict):
        yield from part.items()
    elif isinstance(part, list):
        yield from ((str(number), value) for number, value in enumerate(part))


def _parts(part: dict[str, Any]) -> list[tuple[str, Any]]:
    """(pointer from here, schema) of those that this one has."""
    found = []
    for key, value in part.items():
        if key in MAPS and isinstance(value, dict):
            found += [(f"/{key}/{_escaped(name)}", child) for name, child in value.items()]
        elif key in LISTS and isinstance(value, list):
            found += [(f"/{key}/{number}", child) for number, child in enumerate(value)]
        elif key in ONE:
            found.append((f"/{key}", value))
    return found


def _escaped(name: str) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")


def _resolve(root: Any, pointer: str) -> Any:
    found = root
    for name in pointer.split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return found


# --- closing

OPEN = ("allOf", "if", "dependentSchemas", "not", "$dynamicRef")  # where a property may be named elsewhere


def _closed(schema: Any) -> Any:
    """A copy with objects closed that name their properties; as it is where parts of it come together."""
    text = json.dumps(schema)
    if any(f'"{word}"' in text for word in OPEN):
        return copy.deepcopy(schema)
    return _close(schema)


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            found[key] = {name: _close(part) for name, part in value.items()}
        else:
            found[key] = copy.deepcopy(value) if key in DATA else _close(value)
    others = ("additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref")
    if isinstance(found.get("properties"), dict) and not any(word in found for word in others):
        found["additionalProperties"] = False
        for name in found["required"] if isinstance(found.get("required"), list) else ():
            found["properties"].setdefault(str(name), {})
    return found


# --- patterns

# What ECMA-262, Python and Rust all take for one, and what any of them does.
CLASSES = {
    "s": (
        r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
        r"\t-\r\x1c-\x1f \u0085\u00a0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
    ),
    "d": ("0-9", r"\p{Nd}"),
    "w": ("a-zA-Z0-9_", r"\p{L}\p{M}\p{N}_"),
}
ENDS = r"\n\r\u2028\u2029"
RUST = {"A": "start of text", "z": "end of text", "Z": "end of text", "a": "a bell", "U": "a letter"}


def ecma(pattern: str, at: str) -> str:
    """A pattern of ECMA-262 in Rust's words. SeavlmError where they differ in other ways."""
    out, inside, at_first, negated = [], False, False, False
    if CONTROL.search(pattern):
        raise refused(at, "control characters cannot be written", "Leave them out.")
    i = 0
    while i < len(pattern):
        char = pattern[i]
        pair = pattern[i : i + 2]
        first, at_first = at_first, False
        if char == "\\":
            if pair[1:] in RUST or pair in ("\\<", "\\>") or (pair == "\\b" and inside):
                raise refused(
                    at, f"{pair} is not of ECMA-262, or not the same in Rust", "Write it otherwise."
                )
            code = re.match(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(v)|(0)|(c))", pattern[i:])
            if code and not negated:
                number = int(code[1] or code[2] or "0", 16)
                if CONTROL.match(chr(number)) and not (inside and pattern.startswith("-", i + code.end())):
                    raise refused(at, f"{code[0]}: control characters cannot be written", "Leave them out.")
            if pair[1:] in CLASSES:
                told = CLASSES[pair[1]][negated]
                out.append(told if inside else f"[{told}]")
            elif pair[1:].lower() in CLASSES and pair[1:]:
                told = CLASSES[pair[1].lower()][not negated]
                out.append(f"[^{told}]")
            else:
                out.append(pair)
            i += 2
            continue
        if inside:
            if char == "]":
                inside = negated = False
                if first:
                    raise refused(at, "an empty class", "Write it otherwise.")
            if char in "[&~":
                char = "\\" + char
            if pair == "--":
                raise refused(
                    at, "-- in a class means something else in Rust", r"Write \- for the character."
                )
        elif char == "[":
            inside = at_first = True
            negated = pattern[i + 1 : i + 2] == "^"
            if negated:
                char = "[^"
                i += 1
        elif char == ".":
            char = f"[^{ENDS}]"
        elif pair == "{,":
            raise refused(at, "{, is not a count in ECMA-262", "Write {0,")
        elif pair == "(?" and (pattern[i + 2 : i + 3] not in (":", "<", "=", "!")):
            raise refused(at, f"{pattern[i : i + 4]} is not of ECMA-262", "Write it otherwise.")
        out.append(char)
        i += 1
    return "".join(out)
