"""Can what is outside of this process be had: etcd, NATS, Kubernetes, a model, workers?"""

from dynamo.doctor.facts import Kubernetes, Model, Service, Workers
from dynamo.doctor.judge.verdict import Finding, and_more, level, named
from dynamo.doctor.matrix import Rule, numbers


def service(fact: Service, rule: Rule) -> Finding:
    """etcd or NATS: the oldest server that answers decides, and whether all do."""
    if fact.trouble:
        return named(rule, "wrong settings", "set, but not as it must be", fact.trouble)
    if not fact.answers:
        return named(rule, "not used", "not used")
    answering = [answer for answer in fact.answers if not answer.trouble]
    silent = tuple(f"{answer.where}: {answer.trouble}" for answer in fact.answers if answer.trouble)
    if not answering:
        return named(rule, "silent", f"0 of {len(fact.answers)} answer", and_more(silent))
    oldest = min((answer.version for answer in answering), key=numbers)
    value = ", ".join((f"{oldest} at {answering[0].where}", *fact.notes))
    found = level(rule, oldest, value)
    if silent and found.row.status != "unsupported":
        return named(rule, "some silent", f"{len(answering)} of {len(fact.answers)} answer", and_more(silent))
    return found


def kubernetes(fact: Kubernetes, rule: Rule) -> Finding:
    """Whether discovery goes by it, and whether the API server answers."""
    chosen = fact.discovery == "kubernetes"
    if fact.trouble:
        return named(rule, "wrong settings" if chosen else "in a pod", f"discovery: {fact.discovery}", fact.trouble)
    if fact.answer is None:
        return named(rule, "not used", "not used")
    value = f"{fact.answer.version or 'no answer'} at {fact.answer.where}; discovery: {fact.discovery}"
    if not chosen:
        return named(rule, "in a pod", value)
    if fact.answer.trouble:
        return named(rule, "silent", value, fact.answer.trouble)
    if not numbers(fact.answer.version):
        return named(rule, "unnamed", value)
    return level(rule, fact.answer.version, value)


def model(fact: Model, rule: Rule) -> Finding:
    value = f"{fact.name}: {fact.state}" if fact.name else fact.state
    return named(rule, fact.state, value, fact.detail)


def workers(fact: Workers, rule: Rule) -> Finding:
    count = fact.answering + len(fact.silent)
    value = f"{fact.answering} of {count} endpoints answer; discovery: {fact.discovery}"
    if not count:
        return named(rule, "nobody", f"nobody is there; discovery: {fact.discovery}")
    if not fact.silent:
        return named(rule, "all answer", value)
    return named(rule, "some silent" if fact.answering else "all silent", value, and_more(fact.silent))
