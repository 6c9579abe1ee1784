//! Dates for chat templates, as Python's `strftime` writes them in the C locale, in UTC.
//!
//! Some twenty directives, of which templates use four: not worth a calendar library. One that is not known stays as written.

use std::fmt::Write as _;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Writes the moment `now`, in Unix seconds.
pub(super) fn strftime(format: &str, now: u64) -> String {
    let moment = Moment::at(now);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        match c {
            '%' => moment.write(&mut out, rest.next()),
            c => out.push(c),
        }
    }
    out
}

struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    /// From 1.
    day_of_year: u64,
    /// From Sunday.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Moment {
    fn at(now: u64) -> Self {
        let (days, seconds) = (now / 86_400, now % 86_400);
        // By the mean length of a year, which is off by one at most.
        let guess = 1970 + days * 400 / 146_097;
        let year = (guess - 1..=guess + 1).rfind(|&year| year >= 1970 && days_before(year) <= days).unwrap_or(guess);
        let day_of_year = days - days_before(year);
        let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let (mut month, mut day) = (0, day_of_year);
        while day >= lengths[month] {
            day -= lengths[month];
            month += 1;
        }
        let weekday = usize::try_from((days + 4) % 7).unwrap_or(0);
        let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
        Self { year, month, day: day + 1, day_of_year: day_of_year + 1, weekday, hour, minute, second }
    }

    fn write(&self, out: &mut String, directive: Option<char>) {
        let Self { year, month, day, day_of_year, weekday, hour, minute, second } = *self;
        let (weekday, month_name) = (DAYS[weekday], MONTHS[month]);
        let twelfth = (hour + 11) % 12 + 1;
        // Writing to a String cannot fail.
        let _ = match directive {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{:02}", month + 1),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('j') => write!(out, "{day_of_year:03}"),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('B') => write!(out, "{month_name}"),
            Some('b' | 'h') => write!(out, "{}", &month_name[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{twelfth:02}"),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('F') => write!(out, "{year}-{:02}-{day:02}", month + 1),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

/// Days from 1970 to the start of a year.
fn days_before(year: u64) -> u64 {
    let leaps = |before: u64| before / 4 - before / 100 + before / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_python_writes_them() {
        for (now, format, expect) in [
            (0, "%F %T %a %j", "1970-01-01 00:00:00 Thu 001"),
            (951_782_400, "%d %B %Y %A", "29 February 2000 Tuesday"),
            (1_704_067_199, "%F %T %j %I%p", "2023-12-31 23:59:59 365 11PM"),
            (1_704_067_200, "%F %j %y %I %p", "2024-01-01 001 24 12 AM"),
            (1_735_689_599, "%d %b %Y %j", "31 Dec 2024 366"),
            (4_107_542_400, "%e %h %Y %a", " 1 Mar 2100 Mon"),
            (1_718_500_445, "100%% %q %", "100% %q %"),
        ] {
            assert_eq!(strftime(format, now), expect, "{now}");
        }
        for day in 0..60_000 {
            let Moment { year, month, day: of_month, day_of_year, .. } = Moment::at(day * 86_400);
            assert_eq!(days_before(year) + day_of_year - 1, day);
            assert!((1..=31).contains(&of_month) && month < 12 && day_of_year <= 366, "{day}");
        }
    }
}
