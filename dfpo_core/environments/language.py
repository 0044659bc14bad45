"""How the simulated user and service read text: words, the spellings of a value, slots that are mentioned, yes and no.

Texts are cut to LONGEST_TEXT characters first, so reading takes the same time whatever comes. A value stands in a text where the words
of one of its spellings stand in it one after the other.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_TEXT = 2000  # characters of a turn that are read
_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+")
_MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december"]
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NEGATIVE = {"no", "nope", "not", "false", "without", "unfortunately", "isn", "doesn", "don", "aren", "hasn", "haven", "cannot", "never"}
_POSITIVE = {"yes", "yeah", "yep", "true"}
_FILLER = {"of", "the", "a", "an", "is", "has", "for", "number", "name", "new", "and"}
# What people say instead of a slot's own words.
_ALIASES = {
    "city": {"where", "city", "cities", "town"},
    "location": {"where", "location", "city"},
    "where": {"where", "city", "location"},
    "to": {"where", "going"},
    "from": {"where", "leaving"},
    "destination": {"where", "destination", "going"},
    "origin": {"origin", "departing"},
    "date": {"date", "dates", "day", "when"},
    "time": {"time", "when"},
    "number": {"many"},
    "party": {"party", "people"},
    "size": {"size", "many", "people"},
    "travelers": {"many", "people", "passengers"},
    "passengers": {"many", "people", "travelers"},
    "tickets": {"tickets", "many"},
    "amount": {"amount", "much"},
    "price": {"price", "cost", "much"},
    "receiver": {"receiver", "who", "whom"},
    "phone": {"phone", "contact"},
}


def tokens(text: str) -> list[str]:
    """Words and numbers in lower case; 4,032 and 4.60 are written 4032 and 4.6, eleven is 11."""
    found = _WORD.findall(unicodedata.normalize("NFKC", text[:LONGEST_TEXT]).lower())
    return [_number(word) if word[0].isdigit() else str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in found]


def _number(word: str) -> str:
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", word):
        word = word.replace(",", "")
    return word.rstrip("0").rstrip(".") if re.fullmatch(r"\d+\.\d+", word) else word


def spellings(value: str) -> list[list[str]]:
    """The ways to write a value, as words: a date 2019-03-05 is also March 5th, a time 19:30 also 7:30 pm; the longest first."""
    ways = [tokens(value)]
    if date := re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", value.strip()):
        month, day = int(date[2]), str(int(date[3]))
        if 1 <= month <= 12:
            suffix = "th" if day in ("11", "12", "13") else {"1": "st", "2": "nd", "3": "rd"}.get(day[-1], "th")
            name = _MONTHS[month - 1]
            ways += [[name, day, suffix], [day, suffix, "of", name], [day, suffix, name], [name, day], [day, name]]
    elif time := re.fullmatch(r"(\d{1,2}):(\d\d)(?::00)?", value.strip()):
        hour, minute = int(time[1]) % 24, time[2]
        half, short = ("am" if hour < 12 else "pm"), str(hour % 12 or 12)
        ways += [[f"{short}:{minute}", half], [f"{short}:{minute}", half[0], "m"], [f"{hour:02d}:{minute}"], [f"{hour}:{minute}"]]
        if minute == "00":
            ways += [[short, half], [short, half[0], "m"]]
    return sorted((way for way in ways if way), key=len, reverse=True)


def same(given: str, value: str) -> bool:
    """Whether `given` is a spelling of `value`. Long texts are no value."""
    return len(given) <= LONGEST_TEXT and tokens(given) in spellings(value)


def find(words: list[str], value: str) -> tuple[int, int] | None:
    """Where the first spelling of `value` that stands in `words` starts and ends; None where none does."""
    for way in spellings(value):
        for start in range(len(words) - len(way) + 1):
            if words[start : start + len(way)] == way:
                return start, start + len(way)
    return None


def mentions(words: list[str], slot: str) -> bool:
    """Whether a sentence is about a slot: it has every telling word of the slot's name, or an alias of each."""
    given, parts = set(words), slot.lower().split("_")
    telling = [part for part in parts if part not in _FILLER] or [part for part in parts if part in _ALIASES] or parts
    return all(given & (_ALIASES.get(part, set()) | {part, f"{part}s", part.removesuffix("s")}) for part in telling)


def yes_or_no(words: list[str], slot: str) -> bool | None:
    """What an answer to a yes-or-no question says; None where it says both or neither. Naming the slot without a no is a yes."""
    negative, positive = bool(_NEGATIVE & set(words)), bool(_POSITIVE & set(words))
    if negative and positive:
        return None
    return False if negative else True if positive or mentions(words, slot) else None


def spoken(slot: str) -> str:
    """A slot's name as people say it."""
    return slot.replace("_", " ")
