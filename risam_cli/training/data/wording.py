"""What the words of an expression allow to be done to its picture, so that it stays true (ours).

English only, lower or mixed case. Where a word leaves room for doubt the answer is no: a picture
that is not mirrored costs a little variety, a phrase that is no longer true teaches a falsehood.

Mirroring: left and right change places, also in "leftmost", "left-hand", "lefty", "lft", and so
do clockwise and counterclockwise. That is right for sides of the picture and for sides of bodies
alike: in a mirror a left hand is a right hand. It cannot be told, and the picture stays as it is,
for what can be read (digits, letters, quotes, brands, "says", "number", clocks), for directions
that a mirror does not turn into words (east, port, left field), for other senses of "left" and
"right" ("left over", "is left", "right behind", "right way up"), for "second" and the like that do
not say from where they count, and for words that look like a misspelt left or right or are not of
this alphabet.
"""

from __future__ import annotations

import re


def _words(text: str) -> str:
    """An alternation of words, longest first; a space in one is any space."""
    parts = sorted(text.split("|"), key=len, reverse=True)
    return "|".join(re.escape(part).replace(r"\ ", r"\s+") for part in parts)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{_words(text)})(?![\w-])", re.IGNORECASE)


# --- mirroring ------------------------------------------------------------------------------------

_PAIRS = {
    "left": "right",
    "leftmost": "rightmost",
    "left-most": "right-most",
    "lefthand": "righthand",
    "left-hand": "right-hand",
    "lefthanded": "righthanded",
    "left-handed": "right-handed",
    "leftward": "rightward",
    "leftwards": "rightwards",
    "left-side": "right-side",
    "leftside": "rightside",
    "left-facing": "right-facing",
    "leftest": "rightest",
    "lefter": "righter",
    "lefty": "righty",
    "leftie": "rightie",
    "lft": "rt",
    "clockwise": "counterclockwise",
}
_TWINS = {**_PAIRS, **{right: left for left, right in _PAIRS.items()}}
_TWINS |= {"rght": "lft", "counter-clockwise": "clockwise", "anticlockwise": "clockwise"}
# Behind a hyphen too: "top-left".
_TURNS = re.compile(rf"(?<!\w)(?:{_words('|'.join(_TWINS))})(?![\w-])", re.IGNORECASE)

_READ = _pattern(
    "says|saying|said|reads|reading|read|written|writing|wrote|word|words|text|letter|letters|"
    "lettering|label|labels|labeled|labelled|logo|logos|number|numbers|numbered|num|no.|name|"
    "named|spelled|spelling|initial|initials|sign|signs|license plate|licence plate|numberplate|"
    "plate number|brand|branded|jersey|clock|clocks|o'clock|oclock|o clock|time|caption|title|"
    "watermark|am|pm|script|font|symbol|"
    "nike|adidas|puma|reebok|coca cola|coca-cola|coke|pepsi|apple logo|macbook|dell|sony|samsung|"
    "lenovo|toshiba|microsoft|google|ikea|starbucks|mcdonalds|mcdonald's|heineken|budweiser|"
    "red bull|monster energy|fedex|ups|dhl|usps|lufthansa|ryanair|easyjet|delta|klm|jetblue|"
    "southwest|american airlines|air canada|air france|british airways|qantas|virgin|emirates|"
    "amtrak|greyhound|toyota|honda|ford|bmw|volkswagen|vw|mercedes|yankees|mets|dodgers|red sox"
)
_NOT_TURNED = _pattern(
    "east|west|eastern|western|eastward|westward|northeast|northwest|southeast|southwest|port|"
    "starboard|southpaw|left field|right field|left fielder|right fielder|left wing|right wing|"
    "left winger|right winger|left back|right back|all right|right of way|right angle|"
    "right angled|right-angled|right side up|right-side-up|right way|wrong way|"
    "left over|left-over|left behind|left out|left alone|left open|left standing|left to right|"
    "left-to-right|right to left|right-to-left|left and right|right and left|left-right"
)
# "right behind the man", but not "the one on the right behind the man".
_ADVERB = _pattern(
    "right behind|right beside|right next|right in|right by|right near|right at|right on|"
    "right above|right below|right under|right underneath|right over|right before|right after|"
    "right there|right here|right now|right up|right down|right out|right across|right against|"
    "right along|right around|right between|right inside|right outside|right through|right to"
)
_NOUN_BEFORE = re.compile(
    r"(?:^|\s)(?:the|on|to|at|far|top|bottom|upper|lower|back|front|our|your|my|his|her|its|their|"
    r"most|very|extreme|side)\s+$",
    re.IGNORECASE,
)
# "the slice that is left", but not "the car that is left of the bus".
_REMAINING = re.compile(
    r"(?<![\w-])(?:is|are|was|were|been|being|be|has|had|have|having|gets|got|only|just|still|"
    r"what's|that's|one|ones|he|she|they|who|it)\s+left(?!\s+(?:of|side|hand|most)\b)(?![\w-])",
    re.IGNORECASE,
)
# Or written in one word with another, "topleft", or a turn in two, "counter clockwise".
_MISSPELT = re.compile(
    r"(?<!\w)(?:lef|leff|leef|letf|elft|lf|lt|rig|rihg|rgh|rgt|riht|rite|ritgh|"
    r"(?:counter|anti|contra)[\s-]+clock|clock-|(?!bright|upright|copyright)\w+(?:left|right))[\w-]*",
    re.IGNORECASE,
)
_SPELT = {*_TWINS, "leftover", "leftovers", "rigid", "rigged", "rigging", "rig", "rights", "lefts"}
_ORDINAL = re.compile(r"\b(?:\d*(?:1st|2nd|3rd)|\d*\dth)\b", re.IGNORECASE)
# "the second giraffe" is mostly counted from the left, "the second from the top" is not.
_COUNTED = re.compile(
    rf"(?:{_ORDINAL.pattern}|\b(?:first|second|third|fourth|fifth|sixth|last)\b)(?!.*\bfrom\b)",
    re.IGNORECASE,
)
_T_SHIRT = re.compile(r"\b[tv][\s-](?=shirts?\b|neck\b)", re.IGNORECASE)
_LETTER = re.compile(r"(?<![\w'-])(?:[b-hj-z])(?![\w'])", re.IGNORECASE)
_QUOTES = re.compile('["“”„«»`#]')
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")


def flipped(text: str) -> str | None:
    """The expression after its picture was mirrored left to right; None where it cannot be told.

    Everything but the turned words is kept, capitals and spaces too.
    """
    if any(char.isalpha() and not char.isascii() for char in text):
        return None
    bare = _T_SHIRT.sub("", _ORDINAL.sub(" ", text))
    if any(char.isdigit() for char in bare) or _LETTER.search(bare) or _QUOTES.search(text):
        return None
    if not text.isupper() and _CAPITALS.search(_TURNS.sub("", text)):
        return None
    if _READ.search(text) or _NOT_TURNED.search(text) or _REMAINING.search(text):
        return None
    if _may_be_a_side(text) or (_COUNTED.search(text) and not _TURNS.search(text)):
        return None
    for found in _ADVERB.finditer(text):
        if not _NOUN_BEFORE.search(text[: found.start()]):
            return None
    return _TURNS.sub(lambda found: _like(_TWINS[found[0].lower()], found[0]), text)


def _may_be_a_side(text: str) -> bool:
    """Whether a word looks like a misspelt left or right."""
    return any(word.lower() not in _SPELT for word in _MISSPELT.findall(text))


def _like(word: str, model: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word


# --- cutting --------------------------------------------------------------------------------------

_PLACES = _pattern(
    "left|right|leftmost|rightmost|topmost|bottommost|"
    "lefthand|righthand|lefty|righty|leftie|rightie|leftest|rightest|lft|rt|"
    "rght|lf|lt|l|r|top|bottom|btm|bot|upper|lower|up|down|middle|mid|center|centre|central|"
    "centered|far|farther|further|farthest|furthest|front|back|rear|foreground|background|fore|"
    "corner|corners|edge|edges|side|sides|border|end|ends|first|second|third|fourth|fifth|sixth|"
    "last|next|nearest|closest|near|nearer|closer|close|highest|lowest|high|higher|low|outer|"
    "inner|outermost|innermost|outside|inside|screen|picture|photo|image|pic|frame|shot|camera|"
    "viewer|us|you|cut|cropped|crop|partial|partially|partly|half|visible|whole|entire|full|"
    "hidden|seen|showing|shown|row|column|line|quadrant|clockwise|counterclockwise|"
    "anticlockwise|o'clock|oclock|east|west|north|south|diagonal|adjacent"
)
_RELATIONS = _pattern(
    "of|behind|between|among|amongst|above|below|beneath|under|underneath|over|against|across|"
    "around|beside|besides|beyond|opposite|facing|towards|toward|touching|looking at|talking to|"
    "watching|following|chasing|pointing|surrounded|by|alongside|along|past|through|from|than|"
    "other|others|another|alone|only|except|single|surrounding|group|crowd|rest|two|three|four|"
    "five|six|seven|eight|nine|ten|pair|couple|several|many|"
    # A rival that is cut in two may become the smallest.
    "smallest|smaller|tiniest|littlest|shortest|shorter|thinnest|thinner|narrowest|narrower|least"
)


def survives_cutting(text: str) -> bool:
    """Whether an expression stays true, and clear, if a part of the picture without it is cut off.

    No for places in the picture ("leftmost", "middle", "second from"), for what needs something
    else in view ("behind the car", "the other one"), for numbers and wholes of several, and for
    what speaks of the picture's own edge ("cut off", "half visible").
    """
    return not (
        _PLACES.search(text.replace("-", " "))  # "top-left"
        or _TURNS.search(text)
        or _may_be_a_side(text)
        or _RELATIONS.search(text)
        or _ORDINAL.search(text)
        or any(char.isdigit() for char in text)
        or any(char.isalpha() and not char.isascii() for char in text)
    )


# --- colour ---------------------------------------------------------------------------------------

_COLORS = re.compile(
    r"(?<![a-z])(?:"
    + _words(
        "red|reddish|green|blue|bluish|yellow|purple|orange|cyan|pink|brown|gray|grey|white|black|tan|beige|gold|"
        "golden|silver|maroon|teal|violet|turquoise|magenta|lavender|lilac|indigo|navy|khaki|"
        "cream|ivory|bronze|copper|crimson|scarlet|burgundy|mustard|peach|salmon|olive|lime|mint|"
        "aqua|amber|ginger|auburn|blond|blonde|brunette|redhead|redheaded|blk|wht|wh|yel|blu|grn|"
        "brn|dark|darker|darkest|light|lighter|lightest|bright|brighter|brightest|pale|paler|dim|"
        "dull|vivid|neon|fluorescent|color|colors|colour|colours|colored|coloured|colorful|"
        "colourful|multicolored|colorless|rainbow|shade|shaded|shadow|shadows|shadowed|shiny|"
        "shining|glowing|glow|lit|unlit|sunlit|sunny|faded|faint|blurry|clear|ripe|unripe|rotten|"
        "burnt|burned|tanned|tinted|skin|skinned|monochrome|sepia|denim|wooden|wood|metal|"
        "metallic|chrome|brass|brick|rusty|stained|dirty|clean|camouflage|camo|plaid|striped|"
        "zebra|contrast|tone|hue|caucasian|african|asian|"
        "purplish|whitish|orangish|redder|reddest|bluer|bluest|whiter|whitest|palest|multicolor|"
        "multicolour|multicoloured|bicolor|tricolor|coloring|colouring|fuchsia|mauve|plum|charcoal|"
        "chocolate|rose|rosy|ruby|emerald|tawny|hazel|taupe|azure|ochre|vermilion|platinum|sandy|"
        "pastel|graying|greying|yellowed|checkered|darkened|lighted|lighting|illuminated|backlit|"
        "silhouette|b&w"
    )
    + r")(?:ish|er|est|ly|ness|s|y|shirt|haired)?(?![a-z])",
    re.IGNORECASE,
)


def speaks_of_color(text: str) -> bool:
    """Whether an expression may depend on colour or brightness, by name or by its nature."""
    return bool(_COLORS.search(text)) or any(char.isalpha() and not char.isascii() for char in text)
