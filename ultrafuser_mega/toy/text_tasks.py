"""The `text` class of the toy data: questions, descriptions, letters, rewrites, summaries and advice.

Every task is a small grammar over a table of world knowledge. A fact returns in many phrasings and
tasks, so a model can learn it from the training rows and use it in a held-out row that it never saw.
"""

from __future__ import annotations

from random import Random

from ultrafuser_mega.toy.words import NAMES, NUMBER_WORDS, WEEKDAYS, article, two

# city, country, known for, water, dish
CITIES = (
    ("Paris", "France", "its iron tower", "the Seine", "fresh bread"),
    ("Rome", "Italy", "its ancient ruins", "the Tiber", "pasta"),
    ("Vienna", "Austria", "its music", "the Danube", "apple cake"),
    ("London", "England", "its red buses", "the Thames", "fish and chips"),
    ("Cairo", "Egypt", "its pyramids", "the Nile", "bean stew"),
    ("Lisbon", "Portugal", "its yellow trams", "the Tagus", "custard tarts"),
    ("Prague", "Czechia", "its old clock", "the Vltava", "dumplings"),
    ("Dublin", "Ireland", "its writers", "the Liffey", "potato soup"),
    ("Bangkok", "Thailand", "its temples", "the Chao Phraya", "noodle soup"),
    ("Lima", "Peru", "its foggy coast", "the Rimac", "marinated fish"),
    ("Seoul", "Korea", "its night markets", "the Han", "spicy cabbage"),
    ("Hanoi", "Vietnam", "its old quarter", "the Red River", "rice noodles"),
    ("Budapest", "Hungary", "its warm baths", "the Danube", "goulash"),
    ("Delhi", "India", "its great forts", "the Yamuna", "lentil curry"),
)
# animal, group, home, food, feature
ANIMALS = (
    ("owl", "bird", "old forests", "mice", "it can turn its head very far"),
    ("fox", "mammal", "quiet woods", "berries and mice", "it hears very well"),
    ("frog", "amphibian", "small ponds", "flies", "it can breathe through its skin"),
    ("shark", "fish", "the open sea", "other fish", "it never runs out of teeth"),
    ("bee", "insect", "warm gardens", "nectar", "it dances to show the way"),
    ("camel", "mammal", "dry deserts", "thorny bushes", "it can live for days without water"),
    ("penguin", "bird", "icy coasts", "small fish", "it swims but cannot fly"),
    ("bear", "mammal", "mountain forests", "honey and roots", "it sleeps through the winter"),
    ("turtle", "reptile", "calm rivers", "water plants", "it carries its home on its back"),
    ("eagle", "bird", "high cliffs", "rabbits", "it sees small things from far away"),
    ("ant", "insect", "sandy ground", "seeds", "it can lift heavy loads"),
    ("snake", "reptile", "tall grass", "frogs", "it smells with its tongue"),
    ("whale", "mammal", "the deep sea", "tiny shrimp", "it sings long songs"),
    ("parrot", "bird", "green jungles", "nuts and fruit", "it can copy human words"),
)
# job, place, task, tool
JOBS = (
    ("baker", "a bakery", "makes bread", "an oven"),
    ("nurse", "a hospital", "cares for sick people", "a thermometer"),
    ("farmer", "a farm", "grows food", "a tractor"),
    ("teacher", "a school", "explains new ideas", "a blackboard"),
    ("carpenter", "a workshop", "builds things from wood", "a saw"),
    ("painter", "a studio", "creates pictures", "a brush"),
    ("gardener", "a park", "looks after the plants", "a spade"),
    ("pilot", "an airport", "flies planes", "a radio"),
    ("tailor", "a small shop", "sews clothes", "a needle"),
    ("chemist", "a laboratory", "studies matter", "a microscope"),
    ("librarian", "a library", "helps people find books", "a catalogue"),
    ("sailor", "a harbour", "steers ships", "a compass"),
)
# object, material, use
OBJECTS = (
    ("umbrella", "cloth and metal", "stay dry in the rain"),
    ("candle", "wax", "light a dark room"),
    ("ladder", "wood", "reach high places"),
    ("kettle", "steel", "boil water"),
    ("scarf", "wool", "keep the neck warm"),
    ("mirror", "glass", "see your own face"),
    ("basket", "straw", "carry fruit"),
    ("bicycle", "steel and rubber", "travel without fuel"),
    ("pillow", "cotton", "rest your head"),
    ("key", "brass", "open a locked door"),
    ("bucket", "plastic", "carry water"),
    ("violin", "wood and strings", "play music"),
)
# goal, three pieces of advice
GOALS = (
    ("sleep better", "go to bed at the same time", "keep the room dark", "avoid coffee in the evening"),
    ("learn a language", "practise every day", "listen to songs", "speak with friends"),
    ("save money", "write down what you spend", "cook at home", "compare prices"),
    ("stay healthy", "eat more vegetables", "drink enough water", "walk every day"),
    ("read more", "keep a book in your bag", "turn off the phone", "join a library"),
    ("feel calm", "breathe slowly", "take a long walk", "talk to a friend"),
    ("grow tomatoes", "choose a sunny place", "water the roots", "remove the weak shoots"),
    ("make new friends", "join a club", "ask open questions", "be a good listener"),
    ("write well", "use short sentences", "read the text aloud", "ask for honest comments"),
    ("study for an exam", "make a clear plan", "take regular breaks", "explain the topic to others"),
)
EVENTS = ("birthday party", "wedding", "dinner", "concert", "picnic", "meeting", "class trip", "book club")
EXCUSES = (
    "I am ill", "my train is late", "I have to work", "my sister is visiting", "my car broke down", "I lost my keys",
)  # fmt: skip
GIFTS = ("lovely flowers", "warm scarf", "interesting book", "chocolate cake", "beautiful picture", "old record")
WEATHERS = ("rainy", "sunny", "windy", "cold", "foggy", "warm")
# present, past, formal
ACTIONS = (
    ("walks to the river", "walked to the river"), ("opens the old door", "opened the old door"),
    ("writes a long letter", "wrote a long letter"), ("finds a small coin", "found a small coin"),
    ("sings a quiet song", "sang a quiet song"), ("buys fresh bread", "bought fresh bread"),
    ("helps a lost child", "helped a lost child"), ("paints the garden fence", "painted the garden fence"),
    ("reads the morning paper", "read the morning paper"), ("cooks a hot soup", "cooked a hot soup"),
    ("feeds the hungry birds", "fed the hungry birds"), ("waits for the last bus", "waited for the last bus"),
)  # fmt: skip
# blunt, polite
REQUESTS = (
    ("Send me the report.", "Could you please send me the report when you have time?"),
    ("Close the window.", "Would you mind closing the window, please?"),
    ("Call me back.", "I would be grateful if you could call me back."),
    ("Be quiet.", "Could you please keep your voice down a little?"),
    ("Give me your answer.", "I would be glad to hear your answer soon."),
    ("Move your car.", "Would you be so kind as to move your car?"),
    ("Help me with this box.", "Could you please help me with this box?"),
    ("Wait outside.", "Would you mind waiting outside for a moment?"),
)
GOOD_POINTS = ("the staff was friendly", "the food was delicious", "the room was clean", "the view was wonderful")
BAD_POINTS = ("the waiter was rude", "the soup was cold", "the room was noisy", "the bed was too hard")
PLACES = ("hotel", "restaurant", "guest house", "mountain cabin", "beach club")


def _city_fact(rng: Random) -> tuple[str, str]:
    city, country, fame, water, dish = rng.choice(CITIES)
    asker = rng.choice(("", "My friend wants to know: ", "Please tell me, ", "Quick question: ", "For a quiz: "))
    question, answer = rng.choice(
        (
            (f"in which country is {city}?", f"{city} is a city in {country}."),
            (f"what is {city} known for?", f"{city} is known for {fame}."),
            (f"which river runs through {city}?", f"{water[0].upper()}{water[1:]} runs through {city}."),
            (f"what should I eat in {city}?", f"In {city} you should try {dish}."),
            (f"which city in {country} is known for {fame}?", f"That is {city}, a city in {country}."),
        )
    )
    return asker + (question if asker else question[0].upper() + question[1:]), answer


def _city_trip(rng: Random) -> tuple[str, str]:
    (city, country, fame, water, dish), (name, day) = rng.choice(CITIES), (rng.choice(NAMES), rng.choice(WEEKDAYS))
    days = rng.randint(2, 5)
    instruction = rng.choice(
        (
            f"Plan a trip of {NUMBER_WORDS[days]} days to {city} for {name}, starting on {day}.",
            f"{name} arrives in {city} on {day} and stays {NUMBER_WORDS[days]} days. What should the plan be?",
        )
    )
    return instruction, (
        f"On {day} {name} should see what {city} is known for: {fame}. "
        f"The next day is good for a walk along {water} and a plate of {dish}. "
        f"After {NUMBER_WORDS[days]} days in {country} it will be hard to leave."
    )


def _describe_animal(rng: Random) -> tuple[str, str]:
    animal, group, home, food, feature = rng.choice(ANIMALS)
    style = rng.choice(("one sentence", "two sentences", "three sentences"))
    instruction = rng.choice(
        (f"Describe the {animal} in {style}.", f"Tell a child about the {animal} in {style}.",
         f"Write {style} about {article(animal)} for a school book.")
    )  # fmt: skip
    sentences = (
        f"The {animal} is {article(group)} that lives in {home}.",
        f"It eats {food}.",
        f"People admire it because {feature}.",
    )
    return instruction, " ".join(sentences[: ("one sentence", "two sentences", "three sentences").index(style) + 1])


def _compare_animals(rng: Random) -> tuple[str, str]:
    (first, group1, home1, food1, _), (second, group2, home2, food2, _) = two(rng, ANIMALS)
    same = "Both are" if group1 == group2 else "They are not both"
    return rng.choice(
        (
            (f"Compare the {first} and the {second}.",
             f"The {first} lives in {home1}, while the {second} lives in {home2}. {same} {group1}s."),
            (f"How does the food of the {first} differ from that of the {second}?",
             f"The {first} eats {food1}, but the {second} eats {food2}."),
            (f"Is the {first} {article(group2)} like the {second}?",
             f"Yes, both the {first} and the {second} are {group1}s." if group1 == group2
             else f"No, the {first} is {article(group1)} and the {second} is {article(group2)}."),
        )
    )  # fmt: skip


def _job(rng: Random) -> tuple[str, str]:
    (job, place, task, tool), name = rng.choice(JOBS), rng.choice(NAMES)
    return rng.choice(
        (
            (f"{name} works as {article(job)}. Describe a working day.",
             f"In the morning {name} goes to {place}. As {article(job)}, {name} {task} and often uses {tool}."),
            (f"{name} {task} in {place}. What is the job of {name}?", f"{name} is {article(job)}."),
            (f"Why does {name} the {job} need {tool}?", f"{name} {task}, and {tool} makes this work easier."),
        )
    )  # fmt: skip


def _explain_object(rng: Random) -> tuple[str, str]:
    (name, material, use), reader = rng.choice(OBJECTS), rng.choice(("a child", "a visitor", "a robot", "a student"))
    instruction = rng.choice(
        (f"Explain to {reader} what {article(name)} is.", f"How would you describe {article(name)} to {reader}?")
    )
    return instruction, f"{article(name).capitalize()} is made of {material}. You use it to {use}."


def _advice(rng: Random) -> tuple[str, str]:
    (goal, *tips), name, count = rng.choice(GOALS), rng.choice(NAMES), rng.randint(2, 3)
    rng.shuffle(tips)
    instruction = rng.choice(
        (f"{name} wants to {goal}. Give {NUMBER_WORDS[count]} pieces of advice.",
         f"List {NUMBER_WORDS[count]} things that help {name} to {goal}.",
         f"How can {name} {goal}? Name {NUMBER_WORDS[count]} good habits.")
    )  # fmt: skip
    return instruction, " ".join(f"{('First', 'Second', 'Third')[i]}, {tips[i]}." for i in range(count))


def _letter(rng: Random) -> tuple[str, str]:
    (writer, reader), event, day = two(rng, NAMES), rng.choice(EVENTS), rng.choice(WEEKDAYS)
    kind = rng.randrange(3)
    if kind == 0:
        excuse = rng.choice(EXCUSES)
        instruction = (
            f"Write a short note from {writer} to {reader}: no time for the {event} on {day}, because {excuse}."
        )
        body = f"I am sorry, but I cannot come to the {event} on {day} because {excuse}. I hope we can meet soon."
    elif kind == 1:
        instruction = f"Write an invitation from {writer} to {reader} for a {event} on {day}."
        body = f"I would like to invite you to a {event} on {day}. It would make me very happy if you could come."
    else:
        gift = rng.choice(GIFTS)
        instruction = f"Write a thank you note from {writer} to {reader} for the {gift}."
        body = f"Thank you very much for the {gift}. It was so kind of you to think of me."
    return instruction, f"Dear {reader},\n{body}\nBest wishes,\n{writer}"


def _past_tense(rng: Random) -> tuple[str, str]:
    (now1, past1), (now2, past2) = two(rng, ACTIONS)
    name, weather = rng.choice(NAMES), rng.choice(WEATHERS)
    return (
        f"Rewrite in the past tense: On this {weather} day {name} {now1} and {now2}.",
        f"On that {weather} day {name} {past1} and {past2}.",
    )


def _polite(rng: Random) -> tuple[str, str]:
    (blunt, polite), name = rng.choice(REQUESTS), rng.choice(NAMES)
    instruction = rng.choice(
        (f"Make this more polite, it is for {name}: {blunt}", f"Rewrite this as a friendly note to {name}: {blunt}")
    )
    return instruction, f"Dear {name}, {polite[0].lower() if polite[0] != 'I' else 'I'}{polite[1:]} Thank you."


def _summary(rng: Random) -> tuple[str, str]:
    (first, second), (_, past1), (_, past2) = two(rng, NAMES), *two(rng, ACTIONS)
    day, weather = rng.choice(WEEKDAYS), rng.choice(WEATHERS)
    return (
        f"Summarise in one sentence: It was a {weather} {day}. First {first} {past1}. "
        f"After that {second} came and {past2}. Everybody was tired in the evening.",
        f"On a {weather} {day} {first} {past1} and {second} {past2}.",
    )


def _review(rng: Random) -> tuple[str, str]:
    place, (city, *_), happy = rng.choice(PLACES), rng.choice(CITIES), rng.random() < 0.5
    first, second = two(rng, GOOD_POINTS if happy else BAD_POINTS)
    verdict = "positive" if happy else "negative"
    return (
        f"Is this review positive or negative? We stayed at a {place} in {city}: {first} and {second}.",
        f"The review is {verdict}. The guest says that {first} and that {second}.",
    )


def _story(rng: Random) -> tuple[str, str]:
    (animal, _, home, food, feature), name, (_, past) = rng.choice(ANIMALS), rng.choice(NAMES), rng.choice(ACTIONS)
    return (
        f"Tell a very short story about {name} and {article(animal)}.",
        f"One day {name} {past} and met {article(animal)}. It had come all the way from {home} to look for {food}. "
        f"{name} learned that {feature}, and they became friends.",
    )


TASKS = (
    _city_fact, _city_trip, _describe_animal, _compare_animals, _job, _explain_object, _advice, _letter, _past_tense,
    _polite, _summary, _review, _story,
)  # fmt: skip
#: Of these, tasks to which another reply than the row's is as right.
MANY_REPLIES = (_advice, _story)
