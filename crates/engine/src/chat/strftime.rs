//! Dates as Python's `strftime` writes them in the C locale. Knows no clock and no time zone.

use std::fmt::Write as _;

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
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The date of a day counted from 1970-01-01: year, month and day of the month from 1, day of the year from 1.
///
/// Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(days: i64) -> (i64, usize, i64, i64) {
    let shifted = days + 719_468; // from 0000-03-01, so that a leap day ends its year
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * from_march + 2) / 153;
    let day = from_march - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12;
    let year = year_of_era + era * 400 + i64::from(month < 2);
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let day_of_year = if month < 2 { from_march - 305 } else { from_march + 60 + i64::from(is_leap) };
    (year, month as usize, day, day_of_year) // month is 0 to 11
}

/// `seconds` since 1970-01-01 00:00 by `format`. An unknown directive is an error that names it.
pub(super) fn strftime(seconds: i64, format: &str) -> Result<String, String> {
    let days = seconds.div_euclid(86_400);
    if days.unsigned_abs() > 3_000_000 {
        return Err(format!("{seconds} s since 1970 is outside the years that a date can have"));
    }
    let (year, month, day, day_of_year) = civil(days);
    let second_of_day = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (second_of_day / 3_600, second_of_day / 60 % 60, second_of_day % 60);
    let weekday = (days + 4).rem_euclid(7); // 1970-01-01 was a Thursday
    let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // glibc's `%-d`: without padding.
        let is_padded = directive != Some('-');
        if !is_padded {
            directive = chars.next();
        }
        let (number, width) = match directive {
            Some('Y') => (year, 4),
            Some('y') => (year.rem_euclid(100), 2),
            Some('m') => (month as i64 + 1, 2), // below 12
            Some('d') => (day, 2),
            Some('j') => (day_of_year, 3),
            Some('H') => (hour, 2),
            Some('I') => (twelve, 2),
            Some('M') => (minute, 2),
            Some('S') => (second, 2),
            Some('w') => (weekday, 1),
            name => {
                out.push_str(match name {
                    Some('B') => MONTHS[month],
                    Some('b') => &MONTHS[month][..3],
                    Some('A') => DAYS[weekday as usize], // 0 to 6
                    Some('a') => &DAYS[weekday as usize][..3],
                    Some('p') if hour < 12 => "AM",
                    Some('p') => "PM",
                    Some('%') => "%",
                    other => {
                        return Err(format!("strftime_now: unknown directive %{}", other.unwrap_or(' ')));
                    }
                });
                continue;
            }
        };
        let width = if is_padded { width } else { 0 };
        write!(out, "{number:0width$}").expect("a String takes all writes");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[track_caller]
    fn check(seconds: i64, format: &str, want: &str) {
        assert_eq!(strftime(seconds, format).as_deref(), Ok(want), "{seconds} {format}");
    }

    /// Expected values by Python's `datetime.fromtimestamp(s, UTC).strftime(format)`.
    #[test]
    fn as_python() {
        check(0, "%Y-%m-%d %H:%M:%S %A", "1970-01-01 00:00:00 Thursday");
        check(1_795_425_546, "%d %b %Y", "23 Nov 2026");
        check(1_709_210_096, "%B %-d, %j %y %a %I:%M %p 100%%", "February 29, 060 24 Thu 12:34 PM 100%");
        check(951_782_400, "%Y-%m-%d %j", "2000-02-29 060");
        check(4_107_542_400, "%Y-%m-%d %j %w", "2100-03-01 060 1");
        check(-1, "%Y-%m-%d %H:%M:%S %j", "1969-12-31 23:59:59 365");
    }

    #[test]
    fn unknown_directives_and_dates() {
        assert_eq!(strftime(0, "%Q").unwrap_err(), "strftime_now: unknown directive %Q");
        assert!(strftime(0, "%").is_err());
        assert!(strftime(i64::MIN, "%Y").is_err());
        assert!(strftime(i64::MAX, "%Y").is_err());
    }
}
