//! What a check of a GPU found, said as it comes and kept as JSON.
//!
//! The file is written anew after every line, aside and renamed: a machine that is lent for minutes may be gone before the
//! end, and what was measured until then must be whole.

use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::{Value as Json, json};

/// A decode step, measured.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) rows: usize,
    pub(crate) context: usize,
    /// A step as a host serves it: begun behind the one before it.
    pub(crate) seconds: f64,
    /// A step that is begun when the one before it is finished.
    pub(crate) alone: f64,
    /// The device's part of it.
    pub(crate) device: f64,
    /// What reading the same bytes takes.
    pub(crate) floor: f64,
}

/// The same step by somebody else.
#[derive(Clone, Debug)]
pub(crate) struct PeerFigure {
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) context: usize,
    pub(crate) seconds: f64,
}

/// Everything that was found.
pub(crate) struct Report<'a> {
    out: &'a mut dyn Write,
    path: Option<PathBuf>,
    lines: Vec<Json>,
    figures: Vec<Figure>,
    peers: Vec<PeerFigure>,
    /// Who did the job, and in how many seconds.
    jobs: Vec<(String, f64)>,
    faults: u32,
    skipped: u32,
    good: u32,
    /// The kernel that runs now.
    tried: Option<String>,
}

// === impl Report ===

impl<'a> Report<'a> {
    pub(crate) fn new(out: &'a mut dyn Write, path: Option<PathBuf>) -> Self {
        Self {
            out,
            path,
            lines: Vec::new(),
            figures: Vec::new(),
            peers: Vec::new(),
            jobs: Vec::new(),
            faults: 0,
            skipped: 0,
            good: 0,
            tried: None,
        }
    }

    /// The last line; how many checks failed.
    pub(crate) fn verdict(&mut self) -> anyhow::Result<u32> {
        let Self { good, faults, skipped, .. } = *self;
        let words = format!("verdict: {good} good, {faults} failed, {skipped} figures left out for want of time");
        self.say(&words, json!({"verdict": {"good": good, "faults": faults, "skipped": skipped}}))?;
        Ok(faults)
    }

    pub(crate) fn say(&mut self, words: &str, json: Json) -> anyhow::Result<()> {
        writeln!(self.out, "{words}")?;
        self.out.flush()?;
        self.lines.push(json);
        self.write()
    }

    /// A kernel comes next, or none: it is in the file before it runs, for whoever finds that it never ended.
    pub(crate) fn tries(&mut self, kernel: Option<&str>) -> anyhow::Result<()> {
        if self.tried.as_deref() == kernel {
            return Ok(());
        }
        self.tried = kernel.map(str::to_owned);
        self.write()
    }

    /// A line that is a fault where it is not good.
    pub(crate) fn judge(&mut self, good: bool, words: &str, mut json: Json) -> anyhow::Result<()> {
        self.faults += u32::from(!good);
        self.good += u32::from(good);
        json["good"] = good.into();
        json["words"] = words.into();
        self.say(&format!("{} {words}", if good { "good  " } else { "FAILED" }), json)
    }

    /// Comparisons that there was no time for.
    pub(crate) fn uncompared(&mut self, what: &str, n: usize) -> anyhow::Result<()> {
        self.uncompared_because(what, n, "the time is used up; give more by --budget")
    }

    /// Comparisons that were not made, which is a fault: nothing is known of them.
    pub(crate) fn uncompared_because(&mut self, what: &str, n: usize, why: &str) -> anyhow::Result<()> {
        let words = format!("{n} of {what} were not compared: {why}");
        self.judge(false, &words, json!({"uncompared": what, "count": n}))
    }

    /// Figures that there was no time for.
    pub(crate) fn skip(&mut self, what: &str, n: usize) -> anyhow::Result<()> {
        self.skipped += u32::try_from(n).unwrap_or(u32::MAX);
        self.say(&format!("skipped {n} of {what}: its time is used up"), json!({"skipped": what, "count": n}))
    }

    pub(crate) fn figure(&mut self, figure: Figure) -> anyhow::Result<()> {
        let Figure { what, rows, context, seconds, alone, device, floor } = &figure;
        let words = format!(
            "{what}, {rows} x {context}: {:.3} ms (alone {:.3}, {:.3} on the device), {:.0} tokens/s, {:.1} % of the floor ({:.3} ms)",
            seconds * 1e3,
            alone * 1e3,
            device * 1e3,
            *rows as f64 / seconds,
            floor / seconds * 100.0,
            floor * 1e3
        );
        let json = json!({"figure": what, "rows": rows, "context": context, "seconds": seconds, "alone_seconds": alone,
            "device_seconds": device, "floor_seconds": floor});
        self.figures.push(figure);
        self.say(&words, json)
    }

    /// Somebody did a whole job of prompts and tokens in so many seconds: us first.
    pub(crate) fn job(&mut self, who: &str, seconds: f64) {
        self.jobs.push((who.to_owned(), seconds));
    }

    pub(crate) fn peer(&mut self, figure: PeerFigure) {
        self.peers.push(figure);
    }

    /// All figures side by side.
    pub(crate) fn table(&mut self) -> anyhow::Result<()> {
        if self.figures.is_empty() {
            return Ok(());
        }
        let table = table(&self.figures, &self.peers);
        write!(self.out, "{table}{}", beside(&self.jobs))?;
        Ok(self.out.flush()?)
    }

    fn write(&self) -> anyhow::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let all = json!({"version": env!("CARGO_PKG_VERSION"), "faults": self.faults, "skipped": self.skipped,
            "tried": self.tried, "lines": self.lines});
        let aside = path.with_extension("part");
        std::fs::write(&aside, format!("{all:#}\n"))
            .and_then(|()| std::fs::rename(&aside, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The jobs of others beside ours, which is the first.
fn beside(jobs: &[(String, f64)]) -> String {
    let Some(((own, seconds), others)) = jobs.split_first() else { return String::new() };
    let line = |(who, theirs): &(String, f64)| {
        format!("the same prompts by {who}: {theirs:.3} s; {own} takes {:.2} of it\n", seconds / theirs)
    };
    others.iter().map(line).collect()
}

fn table(figures: &[Figure], peers: &[PeerFigure]) -> String {
    let mut text = String::from(
        "\n| decode step, 8B | rows x context | ms | alone | on the device | host us | tokens/s | of the floor | beside |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for Figure { what, rows, context, seconds, alone, device, floor } in figures {
        let same = peers.iter().filter(|peer| (peer.rows, peer.context) == (*rows, *context));
        let beside: Vec<String> = same
            .map(|peer| format!("{}: {:.3} ms, {:.2} of it", peer.name, peer.seconds * 1e3, seconds / peer.seconds))
            .collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "| {what} | {rows} x {context} | {:.3} | {:.3} | {:.3} | {:.0} | {:.0} | {:.1} % | {} |",
            seconds * 1e3,
            alone * 1e3,
            device * 1e3,
            (alone - device) * 1e6,
            *rows as f64 / seconds,
            floor / seconds * 100.0,
            beside.join("; ")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        let what = "graph".to_owned();
        Figure { what, rows: 8, context: 1_024, seconds: 0.005, alone: 0.005_01, device: 0.004_98, floor: 0.004 }
    }

    #[test]
    fn figures_stand_beside_those_of_others_with_the_same_shape() {
        let peer = |rows| PeerFigure { name: "torch".to_owned(), rows, context: 1_024, seconds: 0.01 };
        let text = table(&[figure()], &[peer(8), peer(9)]);
        let last = text.lines().last().unwrap_or_default();
        let expect = "| graph | 8 x 1024 | 5.000 | 5.010 | 4.980 | 30 | 1600 | 80.0 % | torch: 10.000 ms, 0.50 of it |";
        assert_eq!(last, expect);
    }

    #[test]
    fn jobs_of_others_stand_beside_ours() {
        let jobs =
            |all: &[(&str, f64)]| beside(&all.iter().map(|(who, s)| ((*who).to_owned(), *s)).collect::<Vec<_>>());
        assert_eq!(jobs(&[]) + &jobs(&[("ours", 1.0)]), "");
        let expect = "the same prompts by theirs: 4.000 s; ours takes 0.25 of it\n";
        assert_eq!(jobs(&[("ours", 1.0), ("theirs", 4.0)]), expect);
    }

    #[test]
    fn what_was_found_is_in_the_file_after_every_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("result.json");
        let mut said = Vec::new();
        let mut report = Report::new(&mut said, Some(path.clone()));
        let read = || -> Json { serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("JSON") };
        report.judge(true, "one", json!({"a": 1})).expect("written");
        assert_eq!((&read()["faults"], &read()["lines"][0]["good"]), (&json!(0), &json!(true)));
        report.judge(false, "two", json!({})).expect("written");
        report.figure(figure()).expect("written");
        report.skip("cases", 3).expect("written");
        let all = read();
        assert_eq!((&all["faults"], &all["skipped"], &all["lines"][2]["rows"]), (&json!(1), &json!(3), &json!(8)));
        // What the bundle's script looks for.
        report.tries(Some("a_kernel")).expect("written");
        let has = |text: &str| std::fs::read_to_string(&path).expect("a file").contains(text);
        assert!(has("\n  \"tried\": \"a_kernel\"") && !has("\"verdict\""));
        report.tries(None).expect("written");
        assert_eq!(report.verdict().expect("a verdict"), 1);
        assert!(has("\"verdict\"") && !has("a_kernel"));
        report.table().expect("written");
        let said = String::from_utf8(said).expect("text");
        assert!(said.starts_with(
            "good   one\nFAILED two\ngraph, 8 x 1024: 5.000 ms (alone 5.010, 4.980 on the device), 1600 tokens/s, 80.0 %"
        ));
    }
}
