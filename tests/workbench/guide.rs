//! Follows docs/plugin-guide.md and the pages of single hooks: the commands of a section's ```console blocks, in order, and what the guide says they print.
//!
//! A command is a line behind `$ `. Other lines are what it prints: each must be found in its output, in order, with anything
//! in the place of `...`. The command `pointsman` alone starts the host, which the desk has done.

use crate::Desk;

/// A command and the lines that it must print.
struct Command {
    line: String,
    prints: Vec<String>,
}

/// Commands that install tools.
const INSTALLS: [&str; 2] = ["npm install", "python3 -m venv"];

/// Runs every command of the section `## title` of a page.
pub(crate) fn follow(desk: &Desk, page: &str, title: &str) {
    let commands = commands(page, title);
    assert!(!commands.is_empty(), "the page has no section `{title}` with commands");
    for Command { line, prints } in commands {
        let left_out = !desk.installs && INSTALLS.iter().any(|install| line.starts_with(install));
        if line == "pointsman" || left_out {
            continue;
        }
        // A download may break off.
        let n_tries = if INSTALLS.iter().any(|install| line.starts_with(install)) { 3 } else { 1 };
        let is_there = (1..n_tries).any(|_| desk.shell(&line).status.success());
        let said = if is_there { String::new() } else { desk.run(&line) };
        let mut lines = said.lines();
        for expected in prints {
            assert!(lines.any(|line| fits(&expected, line)), "`{line}` does not print `{expected}`:\n{said}");
        }
    }
}

fn commands(guide: &str, title: &str) -> Vec<Command> {
    let mut commands: Vec<Command> = Vec::new();
    let (mut inside, mut console) = (false, false);
    for line in guide.lines() {
        match line {
            heading if heading.starts_with("## ") => inside = heading[3..] == *title,
            "```console" => console = true,
            "```" => console = false,
            _ if !(inside && console) => {}
            _ => match (line.strip_prefix("$ "), commands.last_mut()) {
                (Some(command), _) => commands.push(Command { line: command.to_owned(), prints: Vec::new() }),
                (None, Some(last)) if last.line.ends_with('\\') => {
                    last.line.pop();
                    last.line.push_str(line);
                }
                (None, Some(last)) => last.prints.push(line.to_owned()),
                (None, None) => panic!("output before the first command of `{title}`: {line}"),
            },
        }
    }
    commands
}

/// Whether `line` is `expected`, with anything for `...`.
fn fits(expected: &str, line: &str) -> bool {
    let mut rest = line;
    expected.split("...").all(|part| match rest.find(part.trim()) {
        Some(at) => {
            rest = &rest[at + part.trim().len()..];
            true
        }
        None => false,
    })
}

#[test]
fn the_guide_is_read_as_it_is_meant() {
    let text =
        "## A\n```console\n$ one \\\n  two\nsays ... this\n```\n```sh\n$ no\n```\n## B\n```console\n$ three\n```\n";
    let found = commands(text, "A");
    assert_eq!((found.len(), &*found[0].line, &*found[0].prints[0]), (1, "one   two", "says ... this"));
    for (expected, line, good) in
        [("a ... c", "a b c", true), ("a ... c", "c b a", false), ("...", "", true), ("x", "axb", true)]
    {
        assert_eq!(fits(expected, line), good, "{expected} {line}");
    }
}
