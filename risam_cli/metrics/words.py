"""The words that slices look for. The lists are ours, and printed in reports, but for COCO's."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


RELATION_WORDS = _words(
    "to the left of|to the right of|on the left of|on the right of|left of|right of|next to|"
    "in front of|on top of|on the back of|at the back of|at the top of|at the bottom of|close to|"
    "closest to|nearest to|nearest|closest|near|beside|besides|behind|between|among|above|below|"
    "beneath|under|underneath|over|against|across|around|inside|outside|holding|wearing|riding|"
    "facing|touching|carrying|looking at|talking to|sitting on|sitting in|standing on|standing in|"
    "lying on|leaning on|attached to|belonging to|surrounded by|covered by|with"
)
PLACE_WORDS = _words(
    "left|right|top|bottom|upper|lower|middle|center|centre|central|leftmost|rightmost|topmost|"
    "bottommost|left-most|right-most|far|front|back|foreground|background|corner|edge|side|"
    "first|second|third|fourth|last|end|lefty|righty"
)
ATTRIBUTE_WORDS = _words(
    "red|green|blue|yellow|purple|orange|cyan|pink|brown|gray|grey|white|black|tan|beige|gold|"
    "golden|silver|maroon|teal|violet|turquoise|dark|light|bright|colorful|colored|"
    "small|smaller|smallest|large|larger|largest|big|bigger|biggest|tiny|huge|little|tall|taller|"
    "tallest|short|shorter|shortest|long|longer|longest|wide|narrow|thin|thick|fat|skinny|"
    "round|square|circular|rectangular|triangular|striped|stripes|plaid|checkered|dotted|spotted|"
    "plain|wooden|metal|metallic|plastic|glass|leather|brick|stone|furry|fuzzy|shiny|old|young|"
    "older|younger|new|empty|full|open|closed|broken|wet|dry|blond|blonde|bald|bearded|"
    "blurry|clear|bare|dirty|clean"
)
COCO_CATEGORIES = _words(
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|"
    "stop sign|parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|"
    "backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|"
    "baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|"
    "bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|"
    "potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|"
    "oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"
)
