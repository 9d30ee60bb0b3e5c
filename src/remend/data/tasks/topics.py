"""What the prompts of `general` are about: open requests, each with words that a prompt may ask for or forbid.

The first four words may be asked for, the others forbidden. No topic is in both splits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A request that can be answered in any form, and eight words that belong to it."""

    request: str
    words: tuple[str, ...]


def _topics(table: str) -> tuple[Topic, ...]:
    """One topic a line: the request, a bar, the words."""
    lines = (line.split("|") for line in table.strip().splitlines())
    return tuple(Topic(request.strip(), tuple(words.split())) for request, words in lines)


TRAIN = _topics(
    """
    Describe a walk along a rocky coast.             | wave gull cliff salt beach sand tide storm
    Explain how to repot a house plant.              | root soil leaf drain water fertiliser sun window
    Say what makes a good bakery.                    | bread crust oven flour sugar price queue cake
    Describe the first snow of the winter.           | flake roof silence coat cold white child street
    Explain why cities have sewers.                  | pipe rain disease waste smell rat tunnel flood
    Give advice on buying a used bicycle.            | brake chain frame tyre gear seller test colour
    Tell the story of a lost umbrella.               | rain train station handle owner bus wind return
    Describe how a library lends books.              | shelf card borrow due fine reader shop ebook
    Explain what a compass needle does.              | north magnet pole map iron ship star battery
    Give tips for a quiet night in a tent.           | ground sleep rope dark mosquito campfire bear phone
    Describe a busy kitchen at noon.                 | cook pan steam plate waiter knife order menu
    Explain how a candle burns.                      | wax wick flame smoke oxygen melt birthday match
    Say how to welcome a new neighbour.              | door greet gift garden noise fence party key
    Describe an old stone bridge.                    | arch river moss lantern boat traffic toll war
    Explain why leaves change colour in autumn.      | tree green sugar light frost red wind rake
    Give advice on learning to swim.                 | breath float kick pool deep fear coach goggle
    Describe a night train.                          | berth window track whistle ticket coffee passenger delay
    Explain how a thermometer works.                 | heat scale liquid glass mercury fever digital ice
    Say why people keep diaries.                     | page memory ink secret lock habit pen blog
    Describe the work of a beekeeper.                | hive honey smoke queen sting wax swarm mask
    Explain how to read a weather map.               | front cloud wind pressure rain sun arrow symbol
    Give tips for packing a small suitcase.          | fold shoe weight sock shirt iron airport strap
    Describe a clockmaker at the bench.              | spring gear lens tiny hand tick repair gold
    Explain why bread rises.                         | yeast dough bubble warm oven salt knead slice
    """
)

HELD_OUT = _topics(
    """
    Explain how a lighthouse helps ships.            | lamp coast fog tower captain radio rock island
    Describe a market square on a summer morning.    | stall fruit bell crowd pigeon music flower cheese
    Give advice on caring for an old cat.            | food vet nap brush basket toy mouse claw
    Explain how a zip fastener closes.               | tooth slider jacket pull button trouser metal plastic
    Say what a volunteer firefighter does.           | hose alarm ladder engine helmet smoke rescue siren
    Describe a desert after rain.                    | sand bloom lizard cloud cactus camel sun dune
    Explain why the sea is salty.                    | river mineral rock ocean fish wave evaporate lake
    Give tips for writing a thank-you letter.        | gift kind sign paper stamp email grandmother wedding
    Describe a mountain hut in a storm.              | wood stove roof guide snow boot soup lightning
    Explain how a seesaw balances.                   | plank pivot weight length child lever playground ground
    Say how a village could save its last shop.      | owner rent milk villager bank parking online mayor
    Describe the sound of an orchestra tuning.       | oboe string note hall violin drum conductor silence
    Explain how soap removes grease.                 | oil water molecule hand foam scent germ towel
    Give advice on speaking before a large audience. | voice pause slide breath fear joke microphone sweat
    Describe a garden pond over one year.            | frog lily ice dragonfly fish heron mud pump
    Explain why planes leave white trails.           | engine ice vapour sky cloud fuel pilot chemical
    Tell the story of a message in a bottle.         | shore cork tide ink sailor treasure island glass
    Say what makes a board game fun.                 | turn dice rule luck board winner card cheat
    Describe a tailor measuring a coat.              | tape sleeve chalk needle button mirror silk scissors
    Explain how a river makes a valley.              | stone bank flood slope glacier bridge delta mill
    Give tips for saving water at home.              | tap shower leak bucket garden bath toilet meter
    Describe a ferry crossing at dawn.               | deck mist rope gull captain car coffee harbour
    Explain how an echo arises.                      | wall sound wave cave shout bat canyon distance
    Say why sleep matters for learning.              | brain rest memory night dream coffee pillow screen
    Describe a workshop that repairs guitars.        | string glue neck tune wood varnish amplifier band
    Explain how vaccines train the body.             | cell virus immune dose needle fever doctor child
    Give advice on choosing a first telescope.       | lens tripod moon star mirror planet price camera
    Tell the story of a dog that guards a bakery.    | bark crumb thief door tail bone police baker
    Describe a school yard during the break.         | ball bell shout bench teacher skip fight sandwich
    Explain how a dam makes electricity.             | turbine lake pressure river wire concrete fish flood
    Say what a good museum guide does.               | painting story room visitor ticket crowd statue shop
    Describe a field of sunflowers.                  | petal stem bee row seed farmer oil crow
    Explain why ice floats.                          | water dense crystal lake cube winter boat polar
    Give tips for a first day at a new job.          | name team colleague lunch desk boss salary tie
    Describe a storm seen from a window.             | glass thunder branch gutter lightning candle roof wind
    Explain how a pencil is made.                    | wood graphite glue paint eraser factory sharpen lead
    Say how two friends can settle a quarrel.        | listen calm sorry trust money anger mediator gift
    Describe a tea house in the hills.               | kettle cup steam leaf guest mountain sugar monk
    Explain how maps show height.                    | contour line slope peak colour valley satellite scale
    Give advice on baking with children.             | bowl spoon flour mess oven egg apron sugar
    """
)

TOPICS = {"train": TRAIN, "held_out": HELD_OUT}
