import pytest
import yaml

GOOD = {"steps": 3, "pause": 0.0, "methods": ["plain"], "seeds": [0]}
FILE = "synthrepro/methods/profiles/toy.yaml"
WHERE = f"{FILE}, profile 'cpu', experiment 'counting': "


def refuse(checkout, content, profile="cpu"):
    checkout.profiles.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    _, error = checkout.cli("measure", "toy", "--profile", profile, status=1)
    assert error.count("\n") == 1
    return error.removeprefix("synthrepro: ").rstrip()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rate": 1}, "key 'rate' is unknown (known: steps, pause, methods, seeds)."),
        (
            {"steps": "many"},
            "key 'steps': Input should be a valid integer, unable to parse string as an integer, not 'many'.",
        ),
        (
            {"seeds": [0, "x"]},
            "key 'seeds.1': Input should be a valid integer, unable to parse string as an integer, not 'x'.",
        ),
    ],
)
def test_a_wrong_key_is_named_with_its_file_profile_and_experiment(checkout, changes, sentence):
    assert refuse(checkout, {"cpu": {"counting": {**GOOD, **changes}}}) == WHERE + sentence


def test_a_missing_key_is_named(checkout):
    section = {key: value for key, value in GOOD.items() if key != "pause"}
    assert refuse(checkout, {"cpu": {"counting": section}}) == WHERE + "key 'pause' is missing."


def test_sections_and_experiments_must_match(checkout):
    good = {"counting": GOOD}
    assert refuse(checkout, {"cpu": {}}).startswith(f"{FILE}, profile 'cpu': experiment 'counting' has no section")
    assert "there is no experiment 'other'; the chapter has counting" in refuse(
        checkout, {"cpu": {**good, "other": GOOD}}
    )
    assert refuse(checkout, {"smoke": good}).startswith(f"{FILE}, profile 'cpu': the profile is missing")


def test_profiles_have_four_names(checkout):
    assert "there is no profile 'cup'; the profiles are smoke, cpu, gpu, paper" in refuse(
        checkout, {"cup": {"counting": GOOD}}
    )
    assert "There is no profile 'cup'" in refuse(checkout, {"cpu": {"counting": GOOD}}, "cup")


def test_a_file_that_is_no_yaml_or_is_missing_is_named(checkout):
    assert refuse(checkout, "cpu: {").startswith(f"{FILE} is no valid YAML")
    assert refuse(checkout, "- cpu").startswith(f"{FILE} must map each profile")
    assert refuse(checkout, "cpu: 3").startswith(f"{FILE} must map each profile")
    checkout.profiles.unlink()
    _, error = checkout.cli("measure", "toy", "--profile", "cpu", status=1)
    assert error.startswith(f"synthrepro: {FILE} is missing")


def test_numbers_in_scientific_notation_are_numbers(checkout):
    # YAML 1.1 reads 1e-3 as text, which silently breaks whatever does not validate.
    checkout.profiles.write_text("cpu: {counting: {steps: 3, pause: 1e-3, methods: [plain], seeds: [0]}}")
    checkout.cli("measure", "toy", "--profile", "cpu")
    assert '"pause": 0.001' in next(checkout.runs.glob("*.json")).read_text()
