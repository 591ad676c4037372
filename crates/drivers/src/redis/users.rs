//! ACL users of a target: brought back from a point, and put back after a failure.
//!
//! `default` and our own user are never touched: their passwords are the target's own.

use stillpoint_core::driver::Loss;
use stillpoint_core::error::Result;

use super::client::Connection;
use super::wire::Reply;

/// The users of a server, a line each. Passwords are hashes.
pub(super) fn list(control: &mut Connection) -> Result<String> {
    let reply = control.command(&["ACL", "LIST"])?;
    Ok(reply.items().iter().map(|line| line.text() + "\n").collect())
}

/// Name and rules of every user that may be touched, from lines of `ACL LIST`.
fn users<'a>(lines: &'a str, own: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let parsed = lines.lines().filter_map(|line| line.strip_prefix("user ")?.split_once(' '));
    parsed.filter(move |(name, _)| *name != "default" && *name != own)
}

/// Whether there is anybody whom a restore of users could concern.
pub(super) fn has_any(lines: &str, own: &str) -> bool {
    users(lines, own).next().is_some()
}

/// Rules without the default that some users are shown with: `reset` spells it out.
fn plain(rules: &str) -> String {
    rules.split(' ').filter(|rule| *rule != "sanitize-payload").collect::<Vec<_>>().join(" ")
}

/// Gives every user of `lines` exactly the rules that stand there; others stay as they are.
pub(super) fn set(control: &mut Connection, own: &str, lines: &str) -> Result<()> {
    let now = list(control)?;
    for (name, rules) in users(lines, own) {
        let mut command = vec!["ACL", "SETUSER", name];
        match users(&now, own).find(|(known, _)| *known == name) {
            // A user whose rules are set anew may lose its connections.
            Some((_, same)) if plain(same) == plain(rules) => continue,
            // The server takes all that follows, or nothing.
            Some(_) => command.push("reset"),
            None => {}
        }
        command.extend(rules.split(' '));
        control.command(&command)?;
    }
    Ok(())
}

/// Makes the users those of `lines` again: who was not there goes.
pub(super) fn put_back(control: &mut Connection, own: &str, lines: &str) -> Result<()> {
    for (name, _) in users(&list(control)?, own) {
        if !users(lines, own).any(|(known, _)| known == name) {
            control.command(&["ACL", "DELUSER", name])?;
        }
    }
    set(control, own, lines)
}

/// Lets the users outlast a restart of the server; tells where they will not.
pub(super) fn save(control: &mut Connection) -> Result<Option<Loss>> {
    let lost = |why: String| Some(Loss { what: "ACL users, once the target starts again".to_owned(), why });
    if control.config("aclfile")?.is_none_or(|path| path.is_empty()) {
        return Ok(lost(
            "the target shows no `aclfile` to save them to: CONFIG REWRITE where it has a file".to_owned(),
        ));
    }
    Ok(match control.ask(&[b"ACL", b"SAVE"])? {
        Reply::Error(text) => lost(format!("the target refuses ACL SAVE: {text}")),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_user_and_our_own_are_never_meant() {
        let lines = "user default on nopass ~* &* +@all\nuser backup on #ab +psync\nuser app off ~a:* (~b +get)\nodd\n";
        let found: Vec<_> = users(lines, "backup").collect();
        assert_eq!(found, [("app", "off ~a:* (~b +get)")]);
        assert!(has_any(lines, "backup") && !has_any("user default on\n", "backup"));
    }
}
