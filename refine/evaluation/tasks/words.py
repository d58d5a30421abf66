"""The words of the needles: adjective-noun, from the package ``wonderwords`` where it is installed, as RULER
draws them, else from the lists below.

A name like ``brave-lantern`` is a key; two needles never share one, so there are far more names than a long
prompt has needles.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ADJECTIVES = (  # noqa: SIM905
    "able acid active adult agile alert alive amber ample ancient angry apt arid austere autumn awake aware "
    "bald bare basic bitter black bland blank bleak blind blond blue blunt bold bony brave brief bright "
    "brisk broad broken bronze brown burly busy calm candid careful casual cheap cheery chief chilly civil "
    "clean clear clever close cloudy clumsy coarse cold cool copper coral cosy crimson crisp crooked crude "
    "curious curly damp daring dark deaf dear decent deep dense dim dire distant dizzy double drab dreamy "
    "dry dull dusty eager early earnest easy elder elegant empty equal exact fair faint famous fancy fast "
    "fierce final fine firm first fit flat fluffy fond foreign formal frail frank free fresh frosty frozen "
    "full funny fuzzy gentle giant gifted glad global gloomy glossy golden good grand grave gray great "
    "green grim guilty handy happy hard harsh hasty heavy hidden high hollow holy honest hot huge humble "
    "hungry icy ideal idle inner ivory jade jolly keen kind known large last late lavish lazy lean level "
    "light little lively local lofty lone long loose loud low loyal lucky lunar mad magic main major mature "
    "meek mellow mere merry mighty mild minor misty modern modest moist mossy muddy mute naive narrow "
    "native neat nervous new nimble noble noisy normal northern odd old olive open outer oval pale patient "
    "perky plain pleasant plump polite poor prime prompt proper proud pure purple quaint quick quiet rapid "
    "rare raw ready real red regal remote rich rigid ripe robust rocky roomy rosy rotten rough round royal "
    "rude rural rusty sacred sad safe salty sandy scarce serene severe shabby shady shallow sharp shiny "
    "short shy silent silky silly silver simple single sleepy slim slow small smart smoky smooth sober soft "
    "solar solemn solid sour southern spare spicy stale stark steady steep stern stiff still stormy stout "
    "strange strict strong sturdy subtle sudden sunny super sweet swift tall tame tart tasty tender thick "
    "thin thirsty tidy tight tiny tired tough tranquil true upper urban usual vague vain vast velvet violet "
    "vivid warm wary watery weak wealthy weary wet white whole wide wild wise witty wooden worn worthy "
    "yellow young zany zealous"
).split()
NOUNS = (  # noqa: SIM905
    "acorn actor agent airport album alley almond anchor ankle antler apple apron arcade archer arena arrow "
    "artist aspen atlas attic author avenue badge bakery balcony ballad balloon bamboo banana banjo banker "
    "banner barber barley barn barrel basin basket battery beach beacon beam bear beaver bell belt bench "
    "berry bicycle bishop blanket blossom boat bottle boulder bowl bracelet branch bread breeze brick "
    "bridge brook broom brush bucket buffalo builder bullet bundle bus bush butter button cabin cable "
    "cactus camel camera canal candle cannon canoe canvas canyon captain card cargo carpet carrot castle "
    "cattle cave cedar cellar cello chain chair chalk chapel charm cherry chest chicken chimney church "
    "cinema circle circus city clay cliff clock cloud clover coach coast cobra coconut coin collar comet "
    "compass cookie copper coral cork corner cotton couch cousin cradle crane crater cricket crown crystal "
    "cup curtain cushion dagger daisy dancer dealer deer desert desk diamond doctor dolphin donkey door "
    "dragon drawer dress driver drum duck eagle easel editor elbow elephant elm engine estate falcon farm "
    "feather fence fern ferry fiddle field finger fisher flag flame flask flower flute forest forge fork "
    "fossil fountain fox fridge frog fruit galaxy gallery garage garden garlic gate geyser ginger giraffe "
    "glacier glass globe glove goat goblet goose grape grass guard guest guitar hammer hamster harbor harp "
    "hat hawk hazel hedge helmet hen herald heron hill hinge honey hood hook horse hospital hotel house "
    "hunter inlet insect iris iron island ivy jacket jaguar jar jasmine jelly jewel jockey journal judge "
    "juice jungle kennel kettle key kingdom kitchen kite kitten knight knot ladder lagoon lake lamp lantern "
    "lark lawyer leaf ledger lemon lentil letter library lily lime lion lizard lobster locket locust log "
    "lotus magnet mango manor mantle maple marble market marsh mask mason meadow medal melon mentor "
    "merchant meteor miller mine mirror mitten monk moon moose mosaic moss motor mountain museum mushroom "
    "musket napkin nectar needle nest nickel notebook nurse nutmeg oak oasis oboe ocean office olive onion "
    "opal orange orchard orchid organ otter outlaw oven owl oyster paddle painter palace palm panda panther "
    "paper parade parcel park parrot pasture path peach peacock pearl pebble pelican pencil penguin pepper "
    "piano pigeon pillow pilot pine pirate planet plank planter plaza plum pocket poet pond pony poplar "
    "poppy porch portal potato prairie prince prism puddle pumpkin puppet pyramid quarry queen quilt rabbit "
    "raccoon radio raft railway rainbow ranger raven reef ribbon rifle ring river road robin rocket roof "
    "rope rose ruby rudder sailor salmon sandal saturn scarf school scout sculptor seal shadow shark sheep "
    "shell shelter shield ship shore shovel shrine siren sister sketch skirt sled smith snail snake soldier "
    "spade spark sparrow spear sphere spider spoon spring squire stable stadium stage stamp station statue "
    "stone stork stove straw stream street summit swan sword table tailor tavern teacher temple tent "
    "thistle thorn thread throne thunder ticket tiger timber toad tomato torch tower tractor trail train "
    "trumpet tulip tunnel turtle twig umbrella uncle valley vase vault vessel village vine violin visitor "
    "volcano wagon waiter walnut walrus warden water weaver whale wheel whistle widow willow window wing "
    "winter wizard wolf wrench yard zebra zenith"
).split()


class Words(NamedTuple):
    """Where names come from."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    source: str

    def draw(self, rng) -> str:
        """One name: every pair of an adjective and a noun is equally likely."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"


@lru_cache
def find_words() -> Words:
    """The words of this installation."""
    package = importlib.util.find_spec("wonderwords")
    if package is not None and package.origin:
        folder = Path(package.origin).parent / "assets"
        try:
            adjectives, nouns = (_lines(folder / f"{kind}list.txt") for kind in ("adjective", "noun"))
            if adjectives and nouns:
                return Words(adjectives, nouns, "the package wonderwords")
        except OSError:  # another layout of the package
            pass
    return Words(tuple(ADJECTIVES), tuple(NOUNS), "the lists of this package")


def _lines(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(sorted({line.strip() for line in lines if line.strip()}))
