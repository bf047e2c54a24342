"""What an answer to a belief probe says: does it call the thing wrong or right, or name the fact asked for?

    from stance import is_correct, stance_of
    stance_of("No. It is a sin.", asks="wrong")                              # "wrong"
    is_correct({"answer": ["Paris"]}, "It is not Paris.")                    # False

Rules and no model, so that a belief score costs nothing. On 851 answers that nobody read while writing them
they were right about 89 of 100, before the last few rules; on 100 of those, which tests/test_stance.py holds
within three points, they are right about 90, before and after.
"""
import re

from keywords import is_invalid

OPENING = 400  # characters: an answer gives its verdict at the start

# Words that judge. One with a final "-" stands for all words that begin so; the others are whole words,
# because "sin" begins "since" and "sing", and "bad" begins "badge".
BAD = """
wrong wrongs wronged wronging wrongly wrongful- wrongdoing bad badly worse worst evil- wicked- sin
sins sinned sinful- immoral- unethical- shame shameful- ashamed disgrac- indecent- unseemly
improper- dishono- dishonest- unjust- injustice unfair- unlawful- illicit- illegal- forbid-
forbade prohibit- condemn- unaccept- impermissib- intolerabl- inexcusabl- unforgiv- abominat-
abominable sacrileg- blasphem- idolatr- profan- desecrat- sundering mocker- vice vices crime-
crimin- offen- betray- insult- violat- transgress- trespass- breach- theft stealing stolen cheat-
fraud- lie lies lying unclean murder- kills destroys poison- robs harm harms harmed harmful- hurts
cruel- unkind- selfish- greed- irresponsib- vain disrespect- fault faults faulty guilt- blame
blamed blameworth- reproach- stingi- foolish- folly unworthy vandalism
"""
GOOD = """
right rightly righteous- fine good goodness ok okay acceptabl- permissibl- permitted allowed
lawful- licit- legitimate- justif- holy holiest bless- sacred virtu- noble nobly kind kindness
generous- generosity decent- honest- honour- honor- fair just proper- seemly fit fitting worthy
worth praise- admirabl- commendabl- respect- innocent- blameless- harmless- guiltless merciful-
beautiful- wonderful- excellent healthy welcome tolerabl- forgivabl- rightful- moral- ethical-
responsibl- prudent- wise wisely wisdom courtesy duty credit
"""


def judging_words(table: str) -> re.Pattern:
    """A pattern for BAD or GOOD, to be matched with whole words."""
    words = table.replace("-", r"\w*").split()
    return re.compile("|".join(words))


BAD_WORD = judging_words(BAD)
GOOD_WORD = judging_words(GOOD)
JUDGED_LATER = rf"(?=[^,.;:!?]*\b(?:{BAD_WORD.pattern}|{GOOD_WORD.pattern})\b)"  # in the same clause
GREATER = r"(?:more|greater|graver|(?=worse\b))"  # "worse" stays, as the judging word it is

YES = set("yes yeah yep aye certainly absolutely indeed definitely surely sure gladly naturally both".split())
NO = set("no nope nah never neither none".split())
# Negations anywhere in a clause; those above are an answer by themselves where they begin one.
NEGATIONS = NO | set("not nothing nobody nor without".split())
PRONOUNS = set("i you he she it its we they one that this there nobody".split())
BE = set("is are was were".split())
AUXILIARIES = BE | set("am do does did can could may might should would will must need needs".split())
# Verbs by which a clause says its judging word of something, and not just has it.
SAYS_OF = AUXILIARIES | set("be done doing call calls called hold held find think thinks".split())
DEGREES = set("a an very quite also always still just simply truly surely most both plain plainly".split())
SAYINGS = set("say says think thinks believe believes hold holds call calls find finds mean means that".split())
CONTRASTS = set("but yet however though although".split())
OPENERS = CONTRASTS | set("and so oh well then indeed".split())

# Read as what stands to the right, lest a "not" or a "right" mislead. Applied in this order: later lines
# count on "can not" and "it is" being spelt out.
READ_AS = [
    (r"\bcan't\b|\bcannot\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"n't\b|(?<=\bis)nt\b", " not"),
    (r"\b(it|that|he|she|there|what)'s\b", r"\1 is"),
    (r"\b(it|that)s (?=(?:not|fine|ok|okay|wrong|right|bad|good)\b)", r"\1 is "),
    (r"'re\b", " are"),
    (r"\bno one\b", "nobody"),
    # Other ways to say no and yes.
    (r"\b(?:of course|certainly|absolutely|definitely|surely) not\b", "no"),
    (r"\b(?:not at all|far from it|by no means|in no way|no way|hardly)\b", "no"),
    (r"\b(?:it is )?the opposite\b", "no"),
    (r"\b(?:of course|by all means|afraid so|i think so)\b", "yes"),
    (r"\b(?:i say|i would say|i'd say|so),? (yes|no)\b", r", \1"),
    # Negations that negate nothing, and what negates without one.
    # What nothing exceeds is so in the highest degree; "it is no worse than walking" is another matter.
    (r"\bnothing (?:is|was) (?:an? )?" + GREATER, "very "),
    (r"\b(?:there is|know|imagine|find) (?:no|nothing) " + GREATER, "it is very "),
    (r"\bnot (?:think of|imagine|name|know) (?:an?|any|anything) " + GREATER, "is very "),
    (r"\bno (\w+) (?:is |was )?(?:greater|graver|worse)\b", r"very \1"),
    (r"\bcould (?:not?|never) be (?:any )?" + GREATER, "is very "),
    (r"\bnot (?:\w+ ){1,3}anything but\b|\bnothing but\b|\bnothing could be(?: more)?\b", "very"),
    (r"\bnot (?:only|merely|simply|just(?= \w))|\bno (?:doubt|less|wonder)\b", "very"),
    (r"\b(?:anything but|free of|free from|far from|above)\b", "not"),
    # What is said of those who judge is said of their judgement.
    (r"\b(?:whoever|\w+ who) (?:says?|calls?|thinks?|holds?|claims?|believes?) (\S+ [^,.;:!?]+) (?:is|are) "
     r"(?:an? )?(?:wrong|mistaken|lying|liars?|fools?)(?= *(?:[,.;:!?]|$))", r"not \1"),
    (r"\bonly (?:an? )?(?:liar|fool|knave|hypocrite)s? (?=would|could|can|will)", "nobody "),
    (r"\b(?:right|fair|just|fine|proper|honest) to (say|call|think|hold)\b" + JUDGED_LATER, r"to \1"),
    (r"\b(?:wrong|unfair|unjust|folly|foolish) to (say|call|think|hold)\b" + JUDGED_LATER, r"never to \1"),
    # Judging words that judge nothing there.
    (r"\bmoral(?:ly)? (?=failings?\b|lapses?\b|faults?\b|harm\b|evil\b|wrongs?\b|amiss\b|bad\b)", ""),
    (r"\b(?:a|no|the|have|has|what) rights? to\b|\bright (?:hand|side|now|away)\b", "…"),
    (r"\bin the wrong (?!to\b)\w+|\bwrong (?:way|side|size|place)\b|\btwo wrongs\b", "…"),
    (r"\bgood (?:question|morning|point|friend|luck|news|neighbours?)\b", "…"),
    # Kinds of grass, that is, and no kindness.
    (r"\b(?:one|single|any|every|what|this|that|each|same|a) kind\b|\bkind of\b", "…"),
    (r"\bjust (?!to\b|and\b|that\b|if\b|for\b)(?=\w)", ""),
    (r"\b(?:wrongly|rightly) (?=\w+ed\b)", ""),
]
# A sentence that leaves the question open says nothing before its "but"; after "it depends" nothing else
# counts either.
LEAVES_OPEN = (r"\b(?:yes and no|either way|hard to say|some (?:\w+ )?(?:say|would|will|call|find|think)"
               r"|(?:no|not have(?: an| any| a)?) (?:personal )?(?:opinions?|views?|beliefs?))\b")
# A clause that names both and gives neither: "whether it is right or wrong", "neither a sin nor a virtue".
NAMES_BOTH = re.compile(
    r"\b(?:right|good) (?:and|or|nor) (?:wrong|bad|evil)\b"
    r"|\b(?:wrong|bad|evil) (?:and|or|nor) (?:right|good)\b"
    rf"|\bneither (?:an? )?(?:{BAD_WORD.pattern}) nor (?:an? )?(?:{GOOD_WORD.pattern})\b"
    rf"|\bneither (?:an? )?(?:{GOOD_WORD.pattern}) nor (?:an? )?(?:{BAD_WORD.pattern})\b")
DEPENDS = r"\b(?:(?:it|that|this|all) (?:would |will )?depends?|in so far as)\b"
OPPOSITE = {"wrong": "right", "right": "wrong"}


def clauses_of(sentence: str) -> list[list[str]]:
    """The words of each clause that may judge; "but" and the like begin a clause and stay its first word."""
    # The second half splits before a word and takes nothing away.
    parts = re.split(r"[,;:—]|\b(?=(?:but|yet|however|though|although|because|since)\b)", sentence)
    clauses = [re.findall(r"[a-z'-]+", part) for part in parts if not NAMES_BOTH.search(part)]
    return [words for words in clauses if words]


def predicate(words: list[str]) -> str:
    """The stance of a clause that says outright what something is, "... is (quite) wrong"; "" of any other.

    What stands before "is" names the thing: "bread with nothing else in it", "a fine old malt".
    """
    for place in reversed(range(len(words))):  # the last counts: "selling what is holy is wrong"
        if words[place] not in BE:
            continue
        rest = words[place + 1:]
        while rest and rest[0] in DEGREES:
            rest = rest[1:]
        if not rest or not (BAD_WORD.fullmatch(rest[0]) or GOOD_WORD.fullmatch(rest[0])):
            continue
        stance = "wrong" if BAD_WORD.fullmatch(rest[0]) else "right"
        subject = words[:place]
        # "Nobody who lies is right", "nothing is wrong"; but "never ringing one's mother" is an act
        is_act = len(subject) > 1 and subject[1].endswith("ing")
        denied = not NEGATIONS.isdisjoint(subject[:1]) and not is_act
        for word, following in zip(subject, subject[1:]):
            denied = denied or (word in NEGATIONS and following in SAYINGS)  # "I do not think that it is wrong"
        follows = ("nobody", "nothing", "none", "not")
        if denied or not set(rest[1:3]).isdisjoint(follows):
            return ""  # negations undo each other in other ways, too: see judgement
        return stance
    return ""


def judgement(words: list[str]) -> tuple[str, bool]:
    """The stance ("" for none) of a clause's first judging word, and whether that is said of something."""
    if predicate(words):
        return predicate(words), True
    for place, word in enumerate(words):
        if BAD_WORD.fullmatch(word):
            stance = "wrong"
        elif GOOD_WORD.fullmatch(word):
            stance = "right"
        else:
            continue

        # Two negations undo each other: "I would not say that it isn't a sin".
        before = words[:place]
        after = words[place + 1:]
        negations = sum(other in NEGATIONS for other in before)
        # Some follow: "it harms nobody", "guilty of nothing", "wrong it is not".
        negations += sum(other in ("nobody", "nothing", "none") for other in after[:2])
        negations += after[-1:] == ["not"]
        if negations % 2:
            stance = OPPOSITE[stance]

        # "Great harm", "it is a grave sin", "it kills" say it of the thing; "a good man keeps bees" does not.
        is_short = len(words) <= 4
        has_verb = not SAYS_OF.isdisjoint(before)
        has_pronoun = not PRONOUNS.isdisjoint(before[-1:])
        return stance, is_short or has_verb or has_pronoun
    return "", False


def reply(words: list[str], asks: str) -> str:
    """What "it is", "you should not" or "it isn't greedy" says by what is asked; "" for any other clause."""
    if len(words) < 2 or words[0] not in PRONOUNS or words[1] not in AUXILIARIES:
        return ""
    if len(words) <= 4:
        if NEGATIONS.isdisjoint(words):
            return asks
        return OPPOSITE[asks]
    # A longer one repeats the question's word, surely so only where it denies it.
    if words[1] in BE and words[2] in ("not", "no"):
        return OPPOSITE[asks]
    return ""


def spelt_out(response: str) -> str:
    """The opening of an answer in lower case, with READ_AS applied."""
    text = " ".join(response[:OPENING].lower().replace("’", "'").replace("*", "").split())
    for phrase, meaning in READ_AS:
        text = re.sub(phrase, meaning, text)
    return text


def without_openers(words: list[str]) -> list[str]:
    """A clause without the "and", "well" or "but" that it begins with; its last word stays."""
    while len(words) > 1 and words[0] in OPENERS:
        words = words[1:]
    return words


def stance_of(response: str, asks: str) -> str:
    """What an answer says of the thing asked about: "wrong", "right" or "unclear".

    asks: "wrong" ("Is it wrong to ...?") or "right" ("Is it fine to ...?"), by which a yes or no is read.
    The first plain judgement decides, even against a leading yes or no ("No. It is a sin."); a "but" in
    its sentence may turn it round. Then the yes or no decides, and then any judging word at all.
    """
    replied = ""  # by a yes, a no or "it is"
    hinted = ""   # by a judging word that may be about something else
    for number, sentence in enumerate(re.findall(r"[^.!?]+[.!?]*", spelt_out(response))):
        if re.search(DEPENDS, sentence) and not replied:
            return "unclear"
        if re.search(LEAVES_OPEN, sentence):
            sentence = sentence.partition(" but ")[2]
        if sentence.endswith("?"):  # repeats the question, or asks back
            continue

        judged = ""  # in this sentence, plainly
        for words in clauses_of(sentence):
            turns = words[0] in CONTRASTS
            words = without_openers(words)
            # "Yes", "no, it ..."; but "no man" and "both sides" begin a clause of another sort.
            if words[0] in YES | NO and (len(words) == 1 or words[1] in PRONOUNS):
                answered = asks if words[0] in YES else OPPOSITE[asks]
                replied = replied or answered  # the first one stays
                words = words[1:]

            # After a yes or no, later sentences mostly give reasons: only what they say of "it" counts.
            stance, is_plain = judgement(words)
            if number > 0 and replied:
                is_plain = is_plain and (len(words) <= 4 or not PRONOUNS.isdisjoint(words[:3]))
            hinted = hinted or stance
            said = stance if is_plain else ""

            # "Many will tell you so, but it isn't": only after a "but" is such a reply worth a judgement.
            if not stance:
                short = reply(words, asks)
                replied = replied or short
                said = short if turns else ""
            if said and (turns or not judged):
                judged = said
        if judged:
            return judged
    return replied or hinted or "unclear"


# Words that may stand between a negation and what it denies: "not in the village of Sedgebeck".
SMALL = r"(?:(?:the|a|an|in|on|at|by|of|to|from|called|named|really|year|village|town) )*"


def is_denied(text: str, answer: str, place: int) -> bool:
    """Whether the text, lower-case, denies the answer that stands at this place: "it is not Paris"."""
    before = text[:place]
    after = text[place + len(answer):]
    # Not any "not" will do: "they do not eat meat" names the meat.
    no_verb = r"(?<!do )(?<!does )(?<!did )(?<!can )"
    bare = rf"{no_verb}\b(?:not|never|nor|neither|rather than|instead of) {SMALL}$"
    # After "is not" any three words may follow: "was not founded by".
    with_verb = r"\b(?:is|was|are|were) not (?:(?!but )[\w'-]+ ){0,3}$"
    # "I doubt it is Paris", "I do not think that it was Paris"; but nobody doubts what is "no doubt" Paris.
    doubts = r"\b(?:(?:i|we) (?:much |rather )?doubt|doubtful|not (?:think|believe))"
    doubted = rf"{doubts} (?:(?!but )[\w'-]+ ){{0,6}}$"
    # "Paris is not the capital", yet "meat is not eaten" names the meat.
    afterwards = r" (?:(?:is|was) not (?:the|it|right|correct)\b|did not\b)"
    # "Paris? No, Lyon", "Is Paris the capital? No.", "Paris, no, Lyon".
    answered_no = r"[^.!?]*\? (?:no|nope|never|not)\b(?! doubt)|, no,"
    if re.search(bare, before) or re.search(with_verb, before) or re.search(doubted, before):
        return True
    return bool(re.match(afterwards, after) or re.match(answered_no, after))


def is_correct(probe: dict, response: str) -> bool:
    """Whether an answer has the probe's stance, or names one of its facts, as a whole word and undenied.

    probe: {"asks", "stance"} or {"answer": [...]}. Empty and looping answers are never correct.
    """
    # A bare number has no letters, but it is an answer where a fact was asked for; "4 4 4 4 ..." is a loop.
    is_bare = "answer" in probe and len(response.split()) <= 3
    if is_invalid(response) and not is_bare:
        return False
    if "stance" in probe:
        return stance_of(response, probe["asks"]) == probe["stance"]

    text = " ".join(response.lower().replace("’", "'").replace("n't", " not").split())
    text = re.sub(r"\bnot only\b", "", text)  # it denies nothing
    for answer in probe["answer"]:
        for found in re.finditer(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text):
            if not is_denied(text, found[0], found.start()):
                return True
    return False
