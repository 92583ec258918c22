"""Vocabulary of objects in photographs: their names, synonyms, and groups of objects that may co-occur.

A caption with "a man" does not mention a person, yet the answer that there is no person is wrong. Objects are therefore
grouped by line if they may be the same object or appear together. An object in a caption excludes its whole line from
questions whose correct answer is no.
"""

from __future__ import annotations

from collections.abc import Iterable

# Each line is a group, with objects separated by bars; an object's first word is its name, the others are synonyms.
LINES = """
person someone adult | man men guy gentleman male | woman women lady ladies female | boy boys | girl girls | child children kid kids toddler | baby infant | people persons group team players family friends couple | crowd audience spectators | face faces head | surfer skater biker cyclist rider climber player | shadow
dog dogs puppy puppies hound retriever poodle
cat cats kitten kittens
horse horses pony | cow cows cattle bull | sheep goat | bear | elephant
bird birds duck ducks seagull pigeon | fish
bicycle bicycles bike bikes bmx | motorcycle motorbike motorcycles dirtbike scooter | helmet helmets | hat hats cap | wheel
car cars van suv | truck trucks | bus buses | train trains subway | vehicle traffic | street streets road roads | city | sidewalk pavement | path trail track
boat boats canoe kayak sailboat raft | water ocean sea | lake river pond stream creek | wave waves surf | pool swimming | beach shore | sand | surfboard board surfing | fountain splash sprinkler
skateboard skateboarder skateboarding ramp
mountain mountains cliff hill hills | rock rocks boulder stone | snow snowy ski skiing snowboard sled | ice
grass grassy lawn | field | park yard garden | tree trees woods forest branch log | leaf leaves | flower flowers | bush
building buildings house houses | wall walls brick | window windows door doorway | fence gate railing | kitchen room
bench benches | chair chairs seat couch | table tables desk
ball balls soccer football basketball baseball tennis | toy toys frisbee doll | swing | slide
shirt shirts t-shirt top | jacket jackets coat vest | dress | sunglasses glasses goggles
guitar instrument | microphone singer singing | camera | phone | book | umbrella | flag flags | sign signs | rope | bottle glass cup drink beer | food cake meal | tent
fire smoke | sky sunset clouds sun
"""  # noqa: E501  # A line is one group, however long.


def _read() -> tuple[dict[str, str], dict[str, frozenset[str]]]:
    thing_of: dict[str, str] = {}
    related: dict[str, frozenset[str]] = {}
    for line in LINES.strip().splitlines():
        things = [part.split() for part in line.split("|")]
        names = frozenset(words[0] for words in things)
        for words in things:
            thing_of.update(dict.fromkeys(words, words[0]))
            related[words[0]] = names
    return thing_of, related


THING_OF, RELATED = _read()


def mentioned_objects(words: Iterable[str]) -> set[str]:
    """Return the names of the objects that words mention."""
    return {THING_OF[word] for word in words if word in THING_OF}


def plausible_objects(things: Iterable[str]) -> set[str]:
    """Return objects and all objects in their groups, which an image that shows them may also show."""
    return {other for thing in things for other in RELATED[thing]}
