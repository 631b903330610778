"""A task in the manner of DeepSeek-V3.2's general agents: hard to solve, easy to verify.

An itinerary of three days is wanted, and all that is known stands in a database behind five functions. A solver proves
that there is an answer within the budget, and a verifier says of any answer whether it is one.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, permutations, product
from typing import Any

from toolbox import Tool, parameters

DAYS = 3
CHEAP_MEAL, DEAR_HOTEL, GOOD = 30, 150, 4.0
KINDS = {"hotels": ("price", "rating"), "restaurants": ("price", "cuisine"), "sights": ("fee", "kind")}
_CITIES = (
    "Arlen", "Brook", "Corvo", "Dunmar", "Elsey", "Farrow", "Gilden",
    "Hollin", "Istra", "Jarrow", "Kelso", "Lorne",
)  # fmt: skip
_CUISINES, _SIGHTS = ("fish", "noodles", "grill", "vegan"), ("museum", "tower", "garden")
_WORDS = (
    "quiet", "old", "bright", "river", "stone", "market", "garden", "window",
    "morning", "harbour", "lantern", "corner", "wooden", "terrace", "narrow",
)  # fmt: skip
PROMPT = """Plan a trip of {days} days, one city a day, and submit it.

- Every day is in another city, and there is a direct train from each city to the next.
- Every day has a hotel, a restaurant and a sight of its city. Hotels are rated {good} or better.
- On a day whose hotel costs {dear} or more, the restaurant costs at most {cheap}.
- All restaurants have different cuisines, all sights are of different kinds.
- Hotels, restaurants, sights and trains together cost at most {budget}.

Find out what there is with the functions; nothing else is true. Call `submit` once with your plan, then answer."""

Entry = Mapping[str, Any]
City = Mapping[str, Any]
"""What is known of a city: a list of entries for each of `KINDS`, and `trains`, the price by the city."""


@dataclass
class Itinerary:
    """The task of a seed.

    Attributes:
        budget: what the cheapest plan costs, and `slack`.
        submitted: the plan that the agent handed in.
    """

    seed: int
    cities: int = 12
    slack: int = 0
    submitted: list[Any] | None = None
    database: sqlite3.Connection = field(init=False, repr=False)
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        self.database = sqlite3.connect(":memory:", check_same_thread=False)
        _fill(self.database, random.Random(self.seed), _CITIES[: self.cities])
        best = solve(self.world(), budget=None)
        assert best is not None, "a world without any plan"
        self.budget = cost(self.world(), best) + self.slack

    @property
    def prompt(self) -> str:
        return PROMPT.format(days=DAYS, good=GOOD, dear=DEAR_HOTEL, cheap=CHEAP_MEAL, budget=self.budget)

    def world(self) -> dict[str, dict[str, Any]]:
        """All that the functions can tell."""
        names = [name for (name,) in self.database.execute("SELECT name FROM cities ORDER BY name")]
        return {name: {what: json.loads(self._list(what, name))[what] for what in (*KINDS, "trains")} for name in names}

    def tools(self) -> list[Tool]:
        listed = [
            Tool(what, f"List the {what} of a city.", parameters(city="Its name."), partial(self._list, what))
            for what in (*KINDS, "trains")
        ]
        day = {name: {"type": "string"} for name in ("city", "hotel", "restaurant", "sight")}
        plan = {"type": "array", "items": {"type": "object", "properties": day, "required": list(day)}}
        schema = {"type": "object", "properties": {"plan": plan}, "required": ["plan"]}
        return [
            Tool("cities", "List all cities.", parameters(), self._cities),
            *listed,
            Tool("submit", "Hand in the plan, a list of days.", schema, self._submit),
        ]

    def verify(self) -> list[str]:
        """What is wrong with the plan that was submitted; nothing if it is right."""
        plan = self.submitted
        return ["no plan was submitted"] if plan is None else faults(self.world(), plan, self.budget)

    def _cities(self) -> str:
        return json.dumps({"cities": [name for (name,) in self.database.execute("SELECT name FROM cities")]})

    def _list(self, what: str, city: str) -> str:
        columns = ("name", *KINDS[what], "description") if what in KINDS else ("destination", "price", "description")
        rows = self.database.execute(f"SELECT {', '.join(columns)} FROM {what} WHERE city = ?", (city,)).fetchall()
        if not rows:
            return f"error: there is no city {city!r}"
        return json.dumps({"city": city, what: [dict(zip(columns, row, strict=True)) for row in rows]})

    def _submit(self, plan: list[Any]) -> str:
        if self.submitted is not None:
            return "error: a plan was submitted already"
        self.submitted = plan
        return "submitted"


def faults(world: Mapping[str, City], plan: Any, budget: int | None) -> list[str]:
    """What is wrong with a plan, whatever it is."""
    fields = ("city", "hotel", "restaurant", "sight")
    if not isinstance(plan, list) or len(plan) != DAYS:
        return [f"expected {DAYS} days"]
    if not all(isinstance(day, dict) and all(isinstance(day.get(name), str) for name in fields) for day in plan):
        return [f"expected in every day {', '.join(fields)}"]
    found: list[str] = []
    days: list[tuple[Entry, Entry, Entry]] = []
    for day in plan:
        city = world.get(day["city"])
        if city is None:
            return [f"there is no city {day['city']}"]
        entries = [_named(city[what], day[what[:-1]]) for what in KINDS]
        if None in entries:
            return [f"{day['city']} lacks what is planned there"]
        days.append(tuple(entries))  # type: ignore[arg-type]
    names = [day["city"] for day in plan]
    if len(set(names)) < DAYS:
        found.append("a city is visited twice")
    found += [f"no train from {a} to {b}" for a, b in pairwise(names) if _train(world, a, b) is None]
    found += [f"{hotel['name']} is rated {hotel['rating']}" for hotel, _, _ in days if hotel["rating"] < GOOD]
    found += [
        f"{meal['name']} is too dear next to {hotel['name']}"
        for hotel, meal, _ in days
        if hotel["price"] >= DEAR_HOTEL and meal["price"] > CHEAP_MEAL
    ]
    if len({meal["cuisine"] for _, meal, _ in days}) < DAYS:
        found.append("a cuisine comes twice")
    if len({sight["kind"] for _, _, sight in days}) < DAYS:
        found.append("a kind of sight comes twice")
    if not found and budget is not None and (total := cost(world, plan)) > budget:
        found.append(f"it costs {total}, more than {budget}")
    return found


def cost(world: Mapping[str, City], plan: list[Any]) -> int:
    total = 0
    for day in plan:
        city = world[day["city"]]
        hotel, meal, sight = (_named(city[what], day[what[:-1]]) for what in KINDS)
        assert hotel is not None
        assert meal is not None
        assert sight is not None
        total += hotel["price"] + meal["price"] + sight["fee"]
    names = [day["city"] for day in plan]
    return total + sum(_train(world, a, b) or 0 for a, b in pairwise(names))


def solve(world: Mapping[str, City], budget: int | None) -> list[dict[str, str]] | None:
    """The cheapest plan, or None where that costs more: every order of cities, and of each the best days."""
    best: tuple[float, list[dict[str, str]]] = (float("inf") if budget is None else budget + 1, [])
    days = {name: list(_days(name, city)) for name, city in world.items()}
    for names in permutations(world, DAYS):
        fares = [_train(world, a, b) for a, b in pairwise(names)]
        least = sum(min((day[0] for day in days[name]), default=0) for name in names)
        if None in fares or least + sum(fare or 0 for fare in fares) >= best[0]:
            continue
        for chosen in product(*(days[name] for name in names)):
            total = sum(price for price, _, _, _ in chosen) + sum(fare or 0 for fare in fares)
            cuisines, kinds = {cuisine for _, cuisine, _, _ in chosen}, {kind for _, _, kind, _ in chosen}
            if total < best[0] and len(cuisines) == len(kinds) == DAYS:
                best = (total, [day for _, _, _, day in chosen])
    return best[1] or None


def _days(name: str, city: City) -> Iterator[tuple[int, str, str, dict[str, str]]]:
    """The cheapest day in a city for each cuisine and kind of sight: price, cuisine, kind, and the day."""
    cheapest: dict[tuple[str, str], tuple[int, str, str, dict[str, str]]] = {}
    for hotel, meal, sight in product(*(city[what] for what in KINDS)):
        if hotel["rating"] < GOOD or (hotel["price"] >= DEAR_HOTEL and meal["price"] > CHEAP_MEAL):
            continue
        key = (meal["cuisine"], sight["kind"])
        price = hotel["price"] + meal["price"] + sight["fee"]
        if key not in cheapest or price < cheapest[key][0]:
            day = {"city": name, "hotel": hotel["name"], "restaurant": meal["name"], "sight": sight["name"]}
            cheapest[key] = (price, *key, day)
    yield from cheapest.values()


def _named(entries: Any, name: str) -> Entry | None:
    return next((entry for entry in entries if entry["name"] == name), None)


def _train(world: Mapping[str, City], start: str, end: str) -> int | None:
    return next((int(train["price"]) for train in world[start]["trains"] if train["destination"] == end), None)


def _fill(database: sqlite3.Connection, rng: random.Random, cities: list[str]) -> None:
    database.execute("CREATE TABLE cities (name)")
    database.executemany("INSERT INTO cities VALUES (?)", [(city,) for city in cities])
    for what, (first, second) in KINDS.items():
        database.execute(f"CREATE TABLE {what} (city, name, {first}, {second}, description)")
    database.execute("CREATE TABLE trains (city, destination, price, description)")
    for city in cities:
        hotels = [(rng.randrange(70, 230), rng.choice((3.5, 3.8, 4.0, 4.3, 4.7))) for _ in range(3)]
        hotels[0] = (hotels[0][0], 4.5)
        meals = [(rng.randrange(12, 60), cuisine) for cuisine in rng.sample(_CUISINES, 3)]
        sights = [(rng.randrange(0, 40), kind) for kind in rng.sample(_SIGHTS, 3)]
        for what, rows in (("hotels", hotels), ("restaurants", meals), ("sights", sights)):
            for number, row in enumerate(rows):
                name = f"{city} {what[:-1]} {number + 1}"
                database.execute(f"INSERT INTO {what} VALUES (?, ?, ?, ?, ?)", (city, name, *row, _prose(rng)))
        others = [other for other in cities if other != city]
        for other in rng.sample(others, len(others) // 2):
            train = (city, other, rng.randrange(8, 70), _prose(rng, 30))
            database.execute("INSERT INTO trains VALUES (?, ?, ?, ?)", train)


def _prose(rng: random.Random, words: int = 145) -> str:
    """What fills a context and says nothing."""
    return " ".join(rng.choice(_WORDS) for _ in range(words))
